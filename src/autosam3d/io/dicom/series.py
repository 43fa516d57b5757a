"""A DICOM series in: the slices of one CT scan, put in order and into one `Volume`, or refused with the reason.

What common readers pass over in silence is an error here: missing and cut slices, two series in one folder,
contradicting duplicates, missing tags. A series of a tilted gantry, or with uneven slices, is resampled to a straight
and even grid (`io.acquired`), which remembers its slices.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from autosam3d.errors import UsageError, VolumeError
from autosam3d.io.dicom.acquired import acquired_slices, even_heights, straightened
from autosam3d.io.dicom.files import CtSlice, count_text, decode_hu, scan_folder
from autosam3d.io.dicom.tags import hashed
from autosam3d.io.grid import canonical_affine, check_affine, check_extent, source_grid, to_canonical
from autosam3d.io.intensity import check_hounsfield
from autosam3d.io.memory import demand_ram
from autosam3d.io.nifti.read import MIN_SLICES
from autosam3d.io.options import DEFAULTS, ReadOptions
from autosam3d.volume import Volume, log_warnings

_SAME_PLACE_MM = 0.01
# Orientation cosines are written with few digits; slices of one stack agree to this.
_SAME_DIRECTION = 1e-3
_MAX_OTHER_ORIENTATION_SHARE = 0.1
_MAX_GAP = 1.5
_MAX_GAP_SHARE = 0.2
_MAX_UNEVEN = 2.0
# Positions are rounded when written (0.6 mm spacing with one decimal); within this share of the spacing they are even.
_EVEN_TOLERANCE = 0.05
_AIR_HU = -1024.0
# Gantries tilt by up to 30 degrees; beyond, positions are rather wrong than leaning.
_MAX_TILT = 35.0
# Units of RescaleType that are no Hounsfield units: optical density, mg/ml, effective atomic number, electron density,
# the same in N/ml, percent. *Source*: DICOM PS3.3 C.11.1.1.2.
_OTHER_UNITS = frozenset(("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"))
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_dicom_series(folder: str | Path, options: ReadOptions = DEFAULTS) -> Volume:
    """The CT series in `folder` (and folders below) as float32 HU [z, y, x] nearest RAS+.

    Slices are ordered by their position along the normal, never by name or number. Localizers and what is no image
    are left out with a warning.

    Raises:
        VolumeError: see `io.dicom.files.scan_folder`, and PATIENTS, MIXED_SIZE, MIXED_FRAME, MIXED_ORIENTATION,
            GANTRY_TILT, MISSING_SLICES (with the gaps), UNEVEN_SPACING, DUPLICATE_SLICE, FEW_SLICES, SPACING, NOT_HU.
        UsageError: SERIES_CHOICE, listing the series by hash; MissingExtraError without pydicom.
        ResourceError: MEMORY.
    """
    folder = Path(folder)
    warnings: list[str] = []
    places, num_files = _stack(folder, options, warnings)
    first, where = places[0][0], f"{folder}: series {places[0][0].series}"
    heights, lean = _heights([place[0] for place in places], where, warnings)
    step_mm, is_even = _step(heights, where, warnings)
    acquired, start = acquired_slices(heights, step_mm, lean, first.shape)
    wide, high = (n + math.ceil(shift) for n, shift in zip(first.shape[::-1], acquired.shifts.max(axis=0), strict=True))
    demand_ram(wide * high * (8 * len(places) + 24) * (1 if is_even and not lean.any() else 2), where,
               options.max_ram_bytes)
    voxels = _decode(places, folder, num_files, warnings)
    if not is_even:
        voxels = even_heights(voxels, heights, step_mm)
    if lean.any():
        shifts = np.arange(len(voxels))[:, None] * step_mm * lean - start
        voxels = straightened(voxels, shifts, _AIR_HU - options.intensity_offset)
    affine, repaired = check_affine(_affine(first, step_mm), where)
    affine = affine @ _moved_by(start)
    warnings += repaired
    shape = (voxels.shape[2], voxels.shape[1], len(voxels))
    warnings += check_extent(affine, shape, where, options.force)
    if options.intensity_offset:
        voxels += np.float32(options.intensity_offset)
        warnings.append(f"{options.intensity_offset:g} HU added to every voxel, as asked")
    warnings += check_hounsfield(voxels, where, may_be_nonfinite=False)
    source = source_grid("dicom", shape, affine)
    if not is_even or lean.any():
        source = replace(source, acquired=acquired)
    canonical = np.ascontiguousarray(to_canonical(voxels.T, source))
    return Volume(canonical, canonical_affine(source), source, log_warnings(folder, warnings), str(folder))


def series_slices(folder: str | Path, options: ReadOptions = DEFAULTS) -> list[CtSlice]:
    """The slices that `read_dicom_series` makes its volume of, along the normal, one a place; pixels are not read.

    Raises as `read_dicom_series`, without what is found in pixels and gaps.
    """
    return [place[0] for place in _stack(Path(folder), options, [])[0]]


def _stack(folder: Path, options: ReadOptions, warnings: list[str]) -> tuple[list[list[CtSlice]], int]:
    """(the slices of the chosen series in the order of their height, those in one place together; number of files)."""
    found = scan_folder(folder, options.force)
    warnings += [f"left out: {count_text(count, kind)}" for kind, count in sorted(found.others.items())]
    slices = _without_strays(_choose_series(found.slices, folder, options, warnings), folder, warnings)
    _check_uniform(slices, folder, options, warnings)
    places = _places(slices)
    _demand_own_uids(places, folder, options, warnings)
    _check_number(len(places), f"{folder}: series {slices[0].series}", options, warnings)
    return places, found.num_files


def _choose_series(slices: list[CtSlice], folder: Path, options: ReadOptions, warnings: list[str]) -> list[CtSlice]:
    by_series: dict[str, list[CtSlice]] = defaultdict(list)
    for ct_slice in slices:
        by_series[ct_slice.series].append(ct_slice)
    if options.series is not None:
        chosen = next((key for key in (options.series, hashed(options.series)) if key in by_series), None)
        if chosen is None:
            raise UsageError("SERIES_CHOICE", folder, f"no such series; the folder has {_listing(by_series)}",
                             "give its SeriesInstanceUID or hash to --series")
    elif len(by_series) == 1:
        chosen = next(iter(by_series))
    else:
        if len({s.patient for s in slices}) > 1:
            raise VolumeError("PATIENTS", folder, "expected one patient, found several", "use one folder a patient")
        stacks = [key for key, group in by_series.items() if len(group) >= MIN_SLICES]
        if len(stacks) != 1:
            raise UsageError("SERIES_CHOICE", folder, f"expected one CT series, found {_listing(by_series)}",
                             "choose one with --series")
        chosen = stacks[0]
        warnings.append(f"series {chosen} is taken; {len(by_series) - 1} shorter ones are left out")
    if len({s.patient for s in by_series[chosen]}) > 1:
        raise VolumeError("PATIENTS", folder, "the slices of one series name different patients", "sort the folder")
    return by_series[chosen]


def _listing(by_series: dict[str, list[CtSlice]]) -> str:
    return "; ".join(f"{key}: {len(group)} slices of {group[0].shape[0]} x {group[0].shape[1]}"
                     for key, group in sorted(by_series.items()))


def _without_strays(slices: list[CtSlice], folder: Path, warnings: list[str]) -> list[CtSlice]:
    """Leave out the few slices that lie across the stack: scouts that are not marked as such."""
    directions = [tuple(np.round(s.orientation, 2).ravel() + 0.0) for s in slices]
    usual = slices[directions.index(Counter(directions).most_common(1)[0][0])].orientation
    stack = [s for s in slices if np.abs(s.orientation - usual).max() <= _SAME_DIRECTION]
    num_across = len(slices) - len(stack)
    if num_across > max(1, _MAX_OTHER_ORIENTATION_SHARE * len(slices)):
        raise VolumeError("MIXED_ORIENTATION", folder, f"{num_across} of {len(slices)} slices lie otherwise than the "
                          "rest", "split the series by orientation")
    if num_across:
        warnings.append(f"left out: {num_across} slices that lie across the stack")
    return stack


def _check_uniform(slices: list[CtSlice], folder: Path, options: ReadOptions, warnings: list[str]) -> None:
    sizes = {(s.shape, (round(s.spacing_mm[0], 4), round(s.spacing_mm[1], 4))) for s in slices}
    if len(sizes) > 1:
        text = "; ".join(f"{r} x {c} pixels of {a:g} x {b:g} mm" for (r, c), (a, b) in sorted(sizes))
        raise VolumeError("MIXED_SIZE", folder, f"expected slices of one size, got {text}", "split the series by size")
    if len({s.frame_of_reference for s in slices}) > 1:
        raise VolumeError("MIXED_FRAME", folder, "the slices name different frames of reference, so their positions "
                          "cannot be compared", "split the series")
    if len({(s.slope, s.intercept) for s in slices}) > 1:
        warnings.append("rescale slope or intercept vary from slice to slice; each is applied to its own slice")
    _check_unit({s.rescale_type for s in slices}, folder, options, warnings)
    if any(s.photometric == "MONOCHROME1" for s in slices):
        warnings.append("MONOCHROME1 turns the display around, not the numbers; the numbers are taken as they are")
    if not all(s.is_ct for s in slices):
        warnings.append("accepted by force: images that are not marked as CT")


def _check_unit(kinds: set[str], folder: Path, options: ReadOptions, warnings: list[str]) -> None:
    """Maps of iodine, of electron density and the like are CT images whose numbers are no HU."""
    other = sorted(kinds & _OTHER_UNITS)
    if other and not options.force:
        raise VolumeError("NOT_HU", folder, f"expected Hounsfield units, got RescaleType {', '.join(other)}: a map "
                          "made from several energies", "name the series of the CT itself; --force takes them as HU")
    if kinds - {"", "HU"}:
        warnings.append("RescaleType is not HU")


def _check_number(num_slices: int, where: str, options: ReadOptions, warnings: list[str]) -> None:
    if num_slices >= MIN_SLICES:
        return
    fault = f"expected at least {MIN_SLICES} slices, got {num_slices}"
    if not options.force or num_slices < 2:
        raise VolumeError("FEW_SLICES", where, fault, "give the whole series, or use --force")
    warnings.append(f"accepted by force: {fault}")


def _normal(ct_slice: CtSlice) -> np.ndarray:
    normal = np.cross(*ct_slice.orientation)
    return normal / np.sqrt(_along(normal, normal))


def _along(vectors: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Inner products of [..., 3] with a direction, summed in this order, which the browser's code has, too: BLAS rounds
    otherwise from machine to machine, and a voxel may hang on the last bit."""
    return vectors[..., 0] * direction[0] + vectors[..., 1] * direction[1] + vectors[..., 2] * direction[2]


def _places(slices: list[CtSlice]) -> list[list[CtSlice]]:
    """Slices in the order of their height, those in one place together."""
    normal = _normal(slices[0])
    places: list[list[CtSlice]] = []
    for ct_slice in sorted(slices, key=lambda s: (float(_along(s.position_lps, normal)), s.number)):
        if places and abs(_along(ct_slice.position_lps - places[-1][0].position_lps, normal)) < _SAME_PLACE_MM:
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
                                  "SOPInstanceUID and lie in different places", "export the series again; --force "
                                  "takes each for an image of its own")
            num_others += 1
    if num_others:
        warnings.append(f"accepted by force: {num_others} slices have the SOPInstanceUID of another one")


def _heights(stack: list[CtSlice], where: str, warnings: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(millimetres above the first slice, of a stack without holes; columns and rows a millimetre that it leans)."""
    offsets = np.array([s.position_lps - stack[0].position_lps for s in stack])
    normal = _normal(stack[0])
    heights = _along(offsets, normal)
    lean = _lean(offsets - heights[:, None] * normal, heights, stack[0], where, warnings)
    _demand_complete(heights, where)
    return heights, lean


def _decode(places: list[list[CtSlice]], folder: Path, num_files: int, warnings: list[str]) -> np.ndarray:
    """float32 [slice, row, column]; a slice that is there twice is taken once, where the two are equal."""
    voxels = np.empty((len(places), *places[0][0].shape), np.float32)
    num_dropped = 0
    for index, place in enumerate(places):
        for ct_slice in place:
            hu, dropped = decode_hu(ct_slice, f"{folder}: file {ct_slice.number} of {num_files}")
            num_dropped += dropped
            if ct_slice is place[0]:
                voxels[index] = hu
            elif not np.array_equal(hu, voxels[index]):
                raise VolumeError("DUPLICATE_SLICE", folder, f"files {place[0].number} and {ct_slice.number} lie in "
                                  "one place and differ: two phases or reconstructions", "split the series")
    if num_dropped:
        warnings.append(f"{num_dropped} slices have bits set above BitsStored (an overlay); these bits are dropped")
    num_twice = sum(len(place) - 1 for place in places)
    if num_twice:
        warnings.append(f"{num_twice} slices were there twice, with equal pixels; each is taken once")
    return voxels


def _step(heights: np.ndarray, where: str, warnings: list[str]) -> tuple[float, bool]:
    """(millimetres between slices of an even grid, whether the slices lie on it)."""
    gaps = np.diff(heights)
    step_mm = float(heights[-1] / len(gaps))
    if np.abs(heights - step_mm * np.arange(len(heights))).max() <= _EVEN_TOLERANCE * step_mm:
        return step_mm, True
    spread = f"slices are {gaps.min():.3g} to {gaps.max():.3g} mm apart"
    if gaps.max() > _MAX_UNEVEN * gaps.min():
        raise VolumeError("UNEVEN_SPACING", where, spread, "reconstruct the scan with even slices")
    step_mm = float(np.median(gaps))
    warnings.append(f"{spread}; resampled to {step_mm:.3g} mm")
    return step_mm, False


def _affine(first: CtSlice, step_mm: float) -> np.ndarray:
    """(column, row, slice) to RAS+ mm. *Source*: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1."""
    lps = np.eye(4)
    lps[:3, 0] = first.orientation[0] * first.spacing_mm[1]
    lps[:3, 1] = first.orientation[1] * first.spacing_mm[0]
    lps[:3, 2] = _normal(first) * step_mm
    lps[:3, 3] = first.position_lps
    return _LPS_TO_RAS @ lps


def _moved_by(voxels: np.ndarray) -> np.ndarray:
    """4x4: (column, row, slice) of a grid that begins so many columns and rows elsewhere to that of the first slice."""
    move = np.eye(4)
    move[:2, 3] = voxels
    return move


def _lean(sideways: np.ndarray, heights: np.ndarray, first: CtSlice, where: str, warnings: list[str]) -> np.ndarray:
    """Columns and rows a millimetre of height: 0 where the stack rises along the normal, else a tilted gantry's."""
    drift = np.linalg.norm(sideways, axis=1)
    # Lean as a ratio, with room for rounding of the written positions.
    if drift.max() <= max(_SAME_DIRECTION * heights[-1], 0.1 * min(first.spacing_mm)):
        return np.zeros(2)
    lean = sideways[-1] / heights[-1]
    if np.abs(sideways - heights[:, None] * lean).max() <= 0.5 * min(first.spacing_mm):
        tilt = float(np.degrees(np.arctan(np.linalg.norm(lean))))
        if tilt > _MAX_TILT:
            raise VolumeError("GANTRY_TILT", where, f"expected a gantry that is tilted by up to {_MAX_TILT:g} degrees, "
                              f"got {tilt:.1f}: the stack is sheared", "resample the series to a straight grid first")
        warnings.append(f"the gantry was tilted by {tilt:.1f} degrees; resampled to a straight grid")
        return _along(first.orientation, lean) / first.spacing_mm[::-1]
    raise VolumeError("MISALIGNED", where, f"slices are shifted sideways by up to {drift.max():.1f} mm",
                      "export the series again")


def _demand_complete(heights: np.ndarray, where: str) -> None:
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    wide = np.flatnonzero(gaps > _MAX_GAP * usual)
    if len(wide) == 0 or len(wide) > _MAX_GAP_SHARE * len(gaps):
        return
    num_missing = np.maximum(1, np.rint(gaps / usual).astype(int) - 1)
    listed = ", ".join(f"{num_missing[i]} after slice {i + 1} at {heights[i]:.1f} mm" for i in wide[:5])
    more = f" and {len(wide) - 5} more gaps" if len(wide) > 5 else ""
    raise VolumeError("MISSING_SLICES", where, f"expected slices every {usual:.3g} mm, missing are {listed}{more}",
                      "export the series again, whole")
