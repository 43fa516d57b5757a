"""Scans that others send, over HTTP or from an archive; the worker processes of both."""
