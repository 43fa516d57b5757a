"""From a scan's grid to windows and back: no files, no torch."""
