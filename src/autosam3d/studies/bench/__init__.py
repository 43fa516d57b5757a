"""How fast a scan is segmented here, by which runtime, and beside MONAI."""
