"""The real nnU-Net v2 as a baseline: a dataset of ours planned, trained and predicted there, as other programs."""
