"""DICOM series in; DICOM SEG and RTSTRUCT out."""
