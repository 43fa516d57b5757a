"""The order of axes everywhere but in files: z to the head, y to the front, x to the right."""

from __future__ import annotations

Size = tuple[int, int, int]
"""How many voxels, tokens or windows along (z, y, x)."""
