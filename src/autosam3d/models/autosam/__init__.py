"""AutoSAM Adapter: the 3D network that was grown from the 2D Segment Anything Model."""
