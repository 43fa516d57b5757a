"""NRRD and MetaImage, the formats of ITK and 3D Slicer, read with the checks that NIfTI files pass."""
