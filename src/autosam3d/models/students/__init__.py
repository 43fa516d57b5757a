"""Small networks that every runtime can run: SwinUNETR, and a residual U-Net as the edge tier."""
