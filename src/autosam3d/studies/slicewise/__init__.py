"""SAM and MedSAM slice by slice, prompted from the truth: what the paper compares with."""
