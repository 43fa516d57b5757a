"""NIfTI files in and out, and the label tables beside them."""
