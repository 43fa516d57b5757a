"""What only a study needs: the paper's tables, SAM on slices, nnU-Net, MONAI's speed."""
