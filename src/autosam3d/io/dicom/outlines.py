"""Outlines of a mask along the borders of its pixels, and the mask inside outlines again.

Coordinates are (x, y) = (column, row) with integers at pixel centres, so borders lie at halves: an outline encloses
exactly the area of its pixels. Outlines through the centres of border pixels would lose half a pixel all around.
"""

from __future__ import annotations

import numpy as np

# Directions of an edge: right, down, left, up; the mask lies to the right of it, seen with y running down.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
# A channel leaves its hole a quarter pixel above a row of centres: on no border, where it would meet corners, and
# on no centre, which would be neither inside nor outside.
_CHANNEL = -0.25


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Closed outlines, float64 [n, 2] without repeating the first point, one for each piece (4-connected) of a mask.

    A hole is joined to what surrounds it by a channel of no width (a keyhole), so that it stays a hole for readers
    that fill by parity, by winding, or that unite outlines. An island inside a hole is a piece of its own.

    Args:
        mask: bool [row, column].
    """
    loops = _loops(mask)
    outer = [loop for loop in loops if _twice_area(loop) > 0]
    holes = sorted((loop for loop in loops if _twice_area(loop) < 0), key=lambda loop: loop[:, 0].min())
    for hole in holes:  # from the left, so that a hole to the left is part of its surroundings by now
        _join(outer, hole)
    return outer


def filled(outline: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """bool [row, column]: whose centres lie inside, by parity of the crossings to the left; any closed polygon."""
    x1, y1 = outline.T
    x2, y2 = np.roll(outline, -1, axis=0).T
    first, last = np.ceil(np.minimum(y1, y2)).astype(int), np.ceil(np.maximum(y1, y2)).astype(int)
    first, last = np.clip(first, 0, shape[0]), np.clip(last, 0, shape[0])
    num_rows = last - first
    edge = np.repeat(np.arange(len(x1)), num_rows)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows) + first[edge]
    x = x1[edge] + (row - y1[edge]) * (x2[edge] - x1[edge]) / (y2[edge] - y1[edge])
    crossings = np.zeros((shape[0], shape[1] + 1), np.int32)
    np.add.at(crossings, (row, np.clip(np.ceil(x).astype(int), 0, shape[1])), 1)
    return np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1


def _loops(mask: np.ndarray) -> list[np.ndarray]:
    """Corners of every border, around pieces to the right and around holes to the left."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return []
    top, left = int(rows[0]), int(columns[0])
    padded = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(bool), 1)
    edges = _edges(padded)
    ahead = dict(edges)
    loops = []
    while ahead:
        x, y, direction = next(iter(ahead))
        corners = []
        while (x, y, direction) in ahead:
            del ahead[x, y, direction]
            x, y = x + _STEPS[direction][0], y + _STEPS[direction][1]
            # Right first: pieces that touch at a corner part.
            turns = ((direction + turn) % 4 for turn in (1, 0, 3))
            after = next(turn for turn in turns if (x, y, turn) in edges)
            if after != direction:
                corners.append((x, y))
            direction = after
        loops.append(np.array(corners, float) + np.array([left - 1.5, top - 1.5]))
    return loops


def _edges(padded: np.ndarray) -> dict[tuple[int, int, int], None]:
    """(x, y, direction) of the start of each border between a pixel inside and one outside; lattice of corners."""
    edges: dict[tuple[int, int, int], None] = {}
    # By direction: where the pixel outside lies (row, column), and which corner of the pixel is the start (x, y).
    for direction, (outside, start) in enumerate((((-1, 0), (0, 0)), ((0, 1), (1, 0)), ((1, 0), (1, 1)),
                                                  ((0, -1), (0, 1)))):
        y, x = np.nonzero(padded & ~np.roll(padded, (-outside[0], -outside[1]), axis=(0, 1)))
        for place in zip((x + start[0]).tolist(), (y + start[1]).tolist(), strict=True):
            edges[*place, direction] = None
    return edges


def _twice_area(loop: np.ndarray) -> float:
    """Positive around a piece, negative around a hole."""
    x, y = loop.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def _join(outer: list[np.ndarray], hole: np.ndarray) -> None:
    """Make `hole` part of the outline that is met first to the left of it."""
    after = np.roll(hole, -1, axis=0)
    leftmost = np.flatnonzero((hole[:, 0] == hole[:, 0].min()) & (after[:, 0] == hole[:, 0]))[0]
    x, y = hole[leftmost, 0], max(hole[leftmost, 1], after[leftmost, 1]) - 0.5 + _CHANNEL
    best: tuple[float, int, int] | None = None
    for index, loop in enumerate(outer):
        ends = np.roll(loop, -1, axis=0)
        met = np.flatnonzero((loop[:, 0] == ends[:, 0]) & (loop[:, 0] < x)
                             & (np.minimum(loop[:, 1], ends[:, 1]) < y) & (y < np.maximum(loop[:, 1], ends[:, 1])))
        for edge in met:
            if best is None or loop[edge, 0] > best[0]:
                best = float(loop[edge, 0]), index, int(edge)
    assert best is not None, "a hole has something around it"
    wall, index, edge = best
    loop = outer[index]
    around = np.concatenate([[[x, y]], np.roll(hole, -(int(leftmost) + 1), axis=0), [[x, y]]])
    outer[index] = np.concatenate([loop[: edge + 1], [[wall, y]], around, [[wall, y]], loop[edge + 1 :]])
