"""Segmentation in processes of their own, so that a service survives a scan that crashes its process."""
