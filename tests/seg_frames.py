"""The frames of a DICOM SEG by what they say of themselves: slice, segment, place and pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom

Frames = dict[tuple[str, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def seg_frames(path: Path) -> Frames:
    """(UID of the slice, segment's number) to position, directions and pixels."""
    ds = pydicom.dcmread(path)
    found: Frames = {}
    for frame, group in zip(ds.pixel_array, ds.PerFrameFunctionalGroupsSequence, strict=True):
        shared = ds.SharedFunctionalGroupsSequence[0]
        turned, named = ((group if name in group else shared)[name].value[0]
                         for name in ("PlaneOrientationSequence", "SegmentIdentificationSequence"))
        key = (str(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID),
               int(named.ReferencedSegmentNumber))
        assert key not in found
        found[key] = (np.array(group.PlanePositionSequence[0].ImagePositionPatient, float),
                      np.array(turned.ImageOrientationPatient, float), frame)
    return found


def demand_equal_frames(found: Path, expected: Path) -> int:
    """Both objects have the same pixels on the same slices; the number of frames."""
    theirs, ours = seg_frames(found), seg_frames(expected)
    assert theirs.keys() == ours.keys()
    for key, (position, directions, frame) in ours.items():
        np.testing.assert_array_equal(theirs[key][2], frame)
        np.testing.assert_allclose(theirs[key][0], position, atol=1e-6)
        np.testing.assert_allclose(theirs[key][1], directions, atol=1e-9)
    return len(ours)
