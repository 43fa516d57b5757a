"""Which images of a folder are the scan: one series of one patient, without what was stored beside its slices."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from autosam3d.errors import UsageError, VolumeError
from autosam3d.io.dicom.files import Folder, count_text
from autosam3d.io.dicom.header import CtSlice, UnfitImage
from autosam3d.io.dicom.tags import hashed
from autosam3d.io.options import ReadOptions
from autosam3d.io.voxels import MIN_SLICES

# Orientation cosines are written with few digits; slices of one stack agree to this.
_SAME_DIRECTION = 1e-3
_MAX_OTHER_ORIENTATION_SHARE = 0.1
# Pixel spacings are written with five digits or more; what differs by less is one.
_SAME_SPACING = 1e-4
_MAX_LISTED = 8
# Units of RescaleType that are no Hounsfield units: optical density, mg/ml, effective atomic number, electron density,
# the same in N/ml, percent. *Source*: DICOM PS3.3 C.11.1.1.2.
_OTHER_UNITS = frozenset(("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"))


def chosen_slices(found: Folder, folder: Path, options: ReadOptions, warnings: list[str]) -> list[CtSlice]:
    """The slices of the one series that is meant, in the order of their files.

    Raises:
        VolumeError: PATIENTS, MIXED_SIZE, MIXED_FRAME, MIXED_ORIENTATION, NOT_HU; that of an image of this series which
            cannot be read as a slice, or of one that does not say which series it is of.
        UsageError: SERIES_CHOICE, listing the series by hash.
    """
    warnings += [f"left out: {count_text(count, kind)}" for kind, count in sorted(found.others.items())]
    slices = _choose_series(found, folder, options, warnings)
    _leave_unfit(found.unfit, slices, warnings)
    slices = _without_strays(slices, folder, warnings)
    _check_uniform(slices, folder, options, warnings)
    return slices


def _choose_series(found: Folder, folder: Path, options: ReadOptions, warnings: list[str]) -> list[CtSlice]:
    by_series: dict[str, list[CtSlice]] = defaultdict(list)
    for ct_slice in found.slices:
        by_series[ct_slice.series].append(ct_slice)
    if options.series is not None:
        keys = options.series, hashed(options.series)
        chosen = next((key for key in keys if key in by_series), None)
        if chosen is None:
            error = next((image.error for image in found.unfit if image.series in keys), None)
            raise error or UsageError("SERIES_CHOICE", folder, f"no such series; the folder has {_listing(by_series)}",
                                      options.remedy("series", "UID_OR_HASH", "", "choose one with {}"))
    elif len(by_series) == 1:
        chosen = next(iter(by_series))
    else:
        if len({s.patient for s in found.slices}) > 1:
            raise VolumeError("PATIENTS", folder, "expected one patient, found several", "use one folder a patient")
        stacks = [key for key, group in by_series.items() if len(group) >= MIN_SLICES]
        if not stacks and len(found.slices) >= MIN_SLICES:
            most = max(map(len, by_series.values()))
            raise UsageError("SERIES_CHOICE", folder, f"expected one CT series, found {len(by_series)} of "
                             f"{'one slice' if most == 1 else f'at most {most} slices'} each",
                             "export the series again, with one SeriesInstanceUID for all of its slices")
        if len(stacks) != 1:
            remedy = options.remedy("series", "UID_OR_HASH", "use one folder a series", ", or choose one with {}")
            raise UsageError("SERIES_CHOICE", folder, f"expected one CT series, found {_listing(by_series)}", remedy)
        chosen = stacks[0]
        warnings.append(f"series {chosen} is taken; {len(by_series) - 1} shorter ones are left out")
    if len({s.patient for s in by_series[chosen]}) > 1:
        raise VolumeError("PATIENTS", folder, "the slices of one series name different patients", "sort the folder")
    return by_series[chosen]


def _listing(by_series: dict[str, list[CtSlice]]) -> str:
    """The longest first."""
    groups = sorted(by_series.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    listed = "; ".join(f"{key}: {len(group)} slices of {group[0].shape[0]} x {group[0].shape[1]}"
                       for key, group in groups[:_MAX_LISTED])
    return listed + (f"; and {len(groups) - _MAX_LISTED} more" if len(groups) > _MAX_LISTED else "")


def _leave_unfit(unfit: list[UnfitImage], slices: list[CtSlice], warnings: list[str]) -> None:
    """An image that cannot be read as a slice counts where the scan may miss it: in its own series."""
    shapes = {s.shape for s in slices}
    num_pages, left_out = 0, Counter[str]()
    for image in unfit:
        is_own = image.series in (slices[0].series, None)
        is_page = image.is_page or (image.shape is not None and image.shape not in shapes)
        if is_own and not is_page:
            raise image.error
        if is_own:
            num_pages += 1
        else:
            left_out[image.error.code] += 1
    if num_pages:
        warnings.append(f"left out: {count_text(num_pages, 'page')}")
    warnings += [f"left out: {count} {'image' if count == 1 else 'images'} of other series that cannot be read ({code})"
                 for code, count in sorted(left_out.items())]


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
    sizes: list[CtSlice] = []
    for ct_slice in slices:
        if not any(_is_one_size(ct_slice, other) for other in sizes):
            sizes.append(ct_slice)
    if len(sizes) > 1:
        text = "; ".join(f"{r} x {c} pixels of {a:.5g} x {b:.5g} mm"
                         for (r, c), (a, b) in sorted((s.shape, s.spacing_mm) for s in sizes)[:_MAX_LISTED])
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


def _is_one_size(a: CtSlice, b: CtSlice) -> bool:
    apart = (abs(mm - other) / other for mm, other in zip(a.spacing_mm, b.spacing_mm, strict=True))
    return a.shape == b.shape and max(apart) <= _SAME_SPACING


def _check_unit(kinds: set[str], folder: Path, options: ReadOptions, warnings: list[str]) -> None:
    """Maps of iodine, of electron density and the like are CT images whose numbers are no HU."""
    other = sorted(kinds & _OTHER_UNITS)
    if other and not options.force and not options.is_raw:
        remedy = options.remedy("force", True, "name the series of the CT itself", "; {} takes them as HU")
        raise VolumeError("NOT_HU", folder, f"expected Hounsfield units, got RescaleType {', '.join(other)}: a map "
                          "made from several energies", remedy)
    if kinds - {"", "HU"}:
        warnings.append("RescaleType is not HU")
