"""Beside the archive: a CT series comes in, its SEG and RTSTRUCT go back, once."""
