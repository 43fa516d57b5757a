"""The frames of a DICOM SEG by what they say of themselves: slice, segment, place, pixels and thickness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom

Frames = dict[tuple[str, int], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


def seg_frames(path: Path) -> Frames:
    """(UID of the slice, segment's number) to position, directions, pixels, and thickness and distance in mm (0 where
    none is told)."""
    ds = pydicom.dcmread(path)
    found: Frames = {}
    for frame, group in zip(ds.pixel_array, ds.PerFrameFunctionalGroupsSequence, strict=True):
        shared = ds.SharedFunctionalGroupsSequence[0]
        turned, named, measures = (
            (group if name in group else shared)[name].value[0] for name in
            ("PlaneOrientationSequence", "SegmentIdentificationSequence", "PixelMeasuresSequence"))
        key = (str(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID),
               int(named.ReferencedSegmentNumber))
        assert key not in found
        found[key] = (np.array(group.PlanePositionSequence[0].ImagePositionPatient, float),
                      np.array(turned.ImageOrientationPatient, float), frame,
                      np.array([measures.SliceThickness, measures.get("SpacingBetweenSlices", 0)], float))
    return found


def demand_equal_frames(found: Path, expected: Path) -> int:
    """Both objects have the same pixels on the same slices; the number of frames."""
    theirs, ours = seg_frames(found), seg_frames(expected)
    assert theirs.keys() == ours.keys()
    for key, (position, directions, frame, measures) in ours.items():
        np.testing.assert_array_equal(theirs[key][2], frame)
        np.testing.assert_allclose(theirs[key][0], position, atol=1e-6)
        np.testing.assert_allclose(theirs[key][1], directions, atol=1e-9)
        np.testing.assert_allclose(theirs[key][3], measures, atol=1e-6)
    return len(ours)
