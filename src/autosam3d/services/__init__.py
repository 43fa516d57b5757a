"""Scans that others send: over HTTP, beside an archive; the workers of both."""
