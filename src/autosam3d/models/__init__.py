"""Tensors in, tensors out: AutoSAM, its students, the baselines."""
