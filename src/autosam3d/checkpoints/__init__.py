"""A model on disk: found, checked, loaded."""
