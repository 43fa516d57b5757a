"""Reads a DICOM series: the slices of one CT scan, sorted, as one `Volume`, or an error with the reason.

What common readers ignore silently is an error here: missing and cut slices, two series in one folder,
contradicting duplicates, missing tags. A series of a tilted gantry, or with uneven slices, is resampled to a straight
and even grid (`io.dicom.acquired`), which records the original slices.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from autosam3d.errors import VolumeError
from autosam3d.io.dicom.acquired import acquired_slices, even_heights, straightened
from autosam3d.io.dicom.acquisitions import demand_one_acquisition
from autosam3d.io.dicom.choice import chosen_slices
from autosam3d.io.dicom.files import scan_folder
from autosam3d.io.dicom.header import CtSlice
from autosam3d.io.dicom.pixels import decode_hu
from autosam3d.io.dicom.stack import Stacking, along, normal_of, stacking_of
from autosam3d.io.grid import canonical_affine, check_affine, check_extent, source_grid, to_canonical
from autosam3d.io.intensity import AIR_HU, settle_intensity
from autosam3d.io.memory import demand_ram
from autosam3d.io.options import DEFAULTS, ReadOptions
from autosam3d.io.voxels import MIN_SLICES
from autosam3d.volume import Volume, log_warnings

_SAME_PLACE_MM = 0.01
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_dicom_series(folder: str | Path, options: ReadOptions = DEFAULTS) -> Volume:
    """The CT series in `folder` (and folders below) as float32 HU [z, y, x] nearest RAS+.

    Slices are ordered by their position along the normal, never by name or number. Localizers and what is no image
    are left out with a warning; padding around the patient is air.

    Raises:
        VolumeError: see `io.dicom.files.scan_folder`, `io.dicom.choice.chosen_slices` and `io.dicom.stack.stacking_of`;
            and DUPLICATE_SLICE, SAME_PLACE, FEW_SLICES, SPACING, NOT_HU.
        UsageError: SERIES_CHOICE, listing the series by hash; ACQUISITION_CHOICE, listing the acquisitions by number;
            MissingExtraError without pydicom.
        ResourceError: MEMORY.
    """
    folder = Path(folder)
    warnings: list[str] = []
    places, num_files = _stack(folder, options, warnings)
    first, where = places[0][0], f"{folder}: series {places[0][0].series}"
    stacking = stacking_of([place[0] for place in places], where, warnings)
    step_mm, lean, is_even = stacking.step_mm, stacking.lean, stacking.is_even
    acquired, start = acquired_slices(stacking.heights_mm, step_mm, lean, first.shape)
    wide, high = (n + math.ceil(shift) for n, shift in zip(first.shape[::-1], acquired.shifts.max(axis=0), strict=True))
    num_slices = max(len(places), stacking.num_slices)
    demand_ram(wide * high * (8 * num_slices + 24) * (1 if is_even and not lean.any() else 2), where,
               options.max_ram_bytes)
    air = math.nan if options.is_raw else AIR_HU - options.offset
    voxels = _decode(places, folder, num_files, air, warnings)
    if options.is_raw:
        air = _fill_padding(voxels)
    if not is_even:
        voxels = even_heights(voxels, stacking.heights_mm, step_mm)
    if lean.any():
        shifts = np.arange(len(voxels))[:, None] * step_mm * lean - start
        voxels = straightened(voxels, shifts, air)
    affine, repaired = check_affine(_affine(first, stacking), where)
    affine = affine @ _moved_by(start)
    warnings += repaired
    shape = (voxels.shape[2], voxels.shape[1], len(voxels))
    warnings += check_extent(affine, shape, where, options)
    warnings += settle_intensity(voxels, where, options, may_be_nonfinite=False)
    source = source_grid("dicom", shape, affine)
    if not is_even or lean.any():
        source = replace(source, acquired=acquired)
    canonical = np.ascontiguousarray(to_canonical(voxels.T, source))
    return Volume(canonical, canonical_affine(source), source, log_warnings(folder, warnings), str(folder),
                  options.intensity or "hu")


def series_slices(folder: str | Path, options: ReadOptions = DEFAULTS) -> list[CtSlice]:
    """The slices of `read_dicom_series`, sorted along the normal, one for each position; pixels are not read.

    Raises as `read_dicom_series`, except for errors in pixels and gaps.
    """
    return [place[0] for place in _stack(Path(folder), options, [])[0]]


def _stack(folder: Path, options: ReadOptions, warnings: list[str]) -> tuple[list[list[CtSlice]], int]:
    """(the slices of the chosen series in the order of their height, those in one place together; number of files)."""
    found = scan_folder(folder, options)
    slices = chosen_slices(found, folder, options, warnings)
    where = f"{folder}: series {slices[0].series}"
    places = _places(slices)
    if len(places) < MIN_SLICES <= len(slices):
        several = "one place" if len(places) == 1 else f"{len(places)} places"
        raise VolumeError("SAME_PLACE", where, f"expected slices one above the other, got {len(slices)} that lie in "
                          f"{several}: no volume can be made of them", "export the series again, with the "
                          "ImagePositionPatient of each slice")
    places = _one_acquisition(places, options, where, warnings)
    _demand_own_uids(places, folder, options, warnings)
    _check_number(len(places), where, options, warnings)
    return places, found.num_files


def _one_acquisition(places: list[list[CtSlice]], options: ReadOptions, where: str, warnings: list[str]
                     ) -> list[list[CtSlice]]:
    slices = [ct_slice for place in places for ct_slice in place]
    place_of = [index for index, place in enumerate(places) for _ in place]
    heights = along(np.array([s.position_lps for s in slices]), normal_of(slices[0].orientation))
    acquired = [s.acquired for s in slices]
    chosen = demand_one_acquisition(acquired, place_of, heights, options, where, warnings)
    return _places([ct_slice for ct_slice, is_chosen in zip(slices, chosen, strict=True) if is_chosen])


def _check_number(num_slices: int, where: str, options: ReadOptions, warnings: list[str]) -> None:
    if num_slices >= MIN_SLICES:
        return
    fault = f"expected at least {MIN_SLICES} slices, got {num_slices}"
    if num_slices < 2:
        raise VolumeError("FEW_SLICES", where, fault, "give the whole series")
    if not options.force:
        raise VolumeError("FEW_SLICES", where, fault, options.remedy("force", True, "give the whole series"))
    warnings.append(f"accepted by force: {fault}")


def _places(slices: list[CtSlice]) -> list[list[CtSlice]]:
    """Slices in the order of their height, those in one place together."""
    normal = normal_of(slices[0].orientation)
    places: list[list[CtSlice]] = []
    for ct_slice in sorted(slices, key=lambda s: (float(along(s.position_lps, normal)), s.number)):
        if places and abs(along(ct_slice.position_lps - places[-1][0].position_lps, normal)) < _SAME_PLACE_MM:
            places[-1].append(ct_slice)
        else:
            places.append([ct_slice])
    return places


def _demand_own_uids(places: list[list[CtSlice]], folder: Path, options: ReadOptions, warnings: list[str]) -> None:
    """A SOPInstanceUID names one image, so what has it in another place is not what it says."""
    first: dict[str, tuple[int, CtSlice]] = {}
    num_others = 0
    for index, place in enumerate(places):
        for ct_slice in place:
            at, named = first.setdefault(ct_slice.instance, (index, ct_slice))
            if not ct_slice.instance or at == index:
                continue
            if not options.force:
                raise VolumeError("DUPLICATE_SLICE", folder, f"files {named.number} and {ct_slice.number} have one "
                                  "SOPInstanceUID and lie in different places", options.remedy(
                    "force", True, "export the series again", "; {} takes each for an image of its own"))
            num_others += 1
    if num_others:
        warnings.append(f"accepted by force: {num_others} slices have the SOPInstanceUID of another one")


def _decode(places: list[list[CtSlice]], folder: Path, num_files: int, air_hu: float, warnings: list[str]
            ) -> np.ndarray:
    """float32 [slice, row, column]; a slice that is there twice is taken once, where the two are equal."""
    voxels = np.empty((len(places), *places[0][0].shape), np.float32)
    num_dropped = num_padding = 0
    for index, place in enumerate(places):
        for ct_slice in place:
            hu, dropped, padding = decode_hu(ct_slice, f"{folder}: file {ct_slice.number} of {num_files}", air_hu)
            num_dropped += dropped
            if ct_slice is place[0]:
                voxels[index] = hu
                num_padding += padding
            elif not np.array_equal(hu, voxels[index], equal_nan=True):
                raise VolumeError("DUPLICATE_SLICE", folder, f"files {place[0].number} and {ct_slice.number} lie in "
                                  "one place and differ: two phases or reconstructions", "split the series")
    if num_dropped:
        warnings.append(f"{num_dropped} slices have bits set above BitsStored (an overlay); these bits are dropped")
    num_twice = sum(len(place) - 1 for place in places)
    if num_twice:
        warnings.append(f"{num_twice} slices were there twice, with equal pixels; each is taken once")
    if num_padding:
        as_what = "the lowest number" if math.isnan(air_hu) else f"air, {AIR_HU:g} HU"
        warnings.append(f"{num_padding} voxels of padding (PixelPaddingValue) are taken as {as_what}")
    return voxels


def _fill_padding(voxels: np.ndarray) -> float:
    """The lowest number, which padding (NaN) becomes in place: what no scale is known for has no air."""
    lowest = min((float(slab[~np.isnan(slab)].min(initial=math.inf)) for slab in voxels), default=math.inf)
    lowest = lowest if math.isfinite(lowest) else 0.0
    for slab in voxels:
        np.nan_to_num(slab, copy=False, nan=lowest)
    return lowest


def _affine(first: CtSlice, stacking: Stacking) -> np.ndarray:
    """(column, row, slice) to RAS+ mm. *Source*: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1."""
    lps = np.eye(4)
    lps[:3, 0] = stacking.orientation[0] * first.spacing_mm[1]
    lps[:3, 1] = stacking.orientation[1] * first.spacing_mm[0]
    lps[:3, 2] = stacking.normal * stacking.step_mm
    lps[:3, 3] = first.position_lps
    return _LPS_TO_RAS @ lps


def _moved_by(voxels: np.ndarray) -> np.ndarray:
    """4x4: (column, row, slice) of a grid that begins so many columns and rows elsewhere to that of the first slice."""
    move = np.eye(4)
    move[:2, 3] = voxels
    return move
