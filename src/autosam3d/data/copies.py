"""The same scan under two names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from autosam3d.data.case import Case
from autosam3d.errors import VolumeError
from autosam3d.io.files import sha256_of


def refuse_copies(parts: Mapping[str, Sequence[Case]]) -> None:
    """One scan under two names would be learnt and then tested, or count twice. Only files of equal size are read.

    Raises:
        VolumeError: LEAK, in two of `parts`; DUPLICATE_SCAN, in one.
    """
    by_size: dict[int, list[tuple[str, Case]]] = defaultdict(list)
    for part, cases in parts.items():
        for case in cases:
            try:
                by_size[case.image_path.stat().st_size].append((part, case))
            except OSError as error:
                raise VolumeError("UNREADABLE", case.image_path, f"cannot be read ({error.strerror})",
                                  "check the file") from None
    for group in by_size.values():
        seen: dict[str, tuple[str, Case]] = {}
        for part, case in group if len(group) > 1 else ():
            digest = sha256_of(case.image_path)
            if digest in seen:
                other_part, other = seen[digest]
                code = "LEAK" if part != other_part else "DUPLICATE_SCAN"
                raise VolumeError(code, case.image_path, f"expected different scans, got the same file as {other.name} "
                                  f"({other_part}) under the name {case.name} ({part})", "take one of them out")
            seen[digest] = (part, case)
