"""A network at work: one interface over the runtimes, and the way of a scan through it."""
