"""Segmenting in processes of their own: what a service needs that must outlive every scan."""
