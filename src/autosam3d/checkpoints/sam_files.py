"""SAM weight files: from a path or from the Hugging Face hub to checked tensors. Names are `models.sam_weights`' job.

A weight file is a program until proven otherwise: pickles are read by torch's restricted reader only, zip members
must be stored plainly, and no size is believed that the file cannot hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autosam3d.errors import CheckpointError, MissingExtraError
from autosam3d.user_folders import cache_folder, may_be_made

_log = logging.getLogger(__name__)

_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_PATIENCE_S = 5.0
"""For the hub's first answer."""
_NESTED = ("model", "state_dict", "model_state_dict")
"""Where training scripts put the weights beside optimiser and epoch."""
_GET_A_FILE = (
    "download sam_vit_b_01ec64.pth, medsam_vit_b.pth or the hub's model.safetensors where there is a network, copy it "
    "to this machine and give --sam its path"
)


def read_sam_state(source: str | Path) -> tuple[dict[str, Tensor], str]:
    """SAM's tensors by name and the SHA-256 of the file they came from.

    Args:
        source: a .pth, .pt, .bin or .safetensors file, a folder with one as the hub lays it out, or a hub id such as
            ``facebook/sam-vit-base`` (needs the extra ``sam``).

    Raises:
        CheckpointError: NO_SAM, OFFLINE, CORRUPT, UNSAFE, MISMATCH (no tensors by name) or NONFINITE.
        MissingExtraError: a hub id without huggingface_hub.
    """
    path = _locate(source)
    digest = _sha256(path)
    state = _state_of(_read_safetensors(path) if _is_safetensors(path) else _read_torch(path), path)
    _check_numbers(state, path)
    _log.info("read %d tensors from %s (sha256 %s)", len(state), path, digest)
    return state, digest


def _locate(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        for name in _HUB_FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(
            "NO_SAM", path, f"expected a weight file or a folder with {' or '.join(_HUB_FILES)}, got a folder "
            "without", "name the file itself",
        )
    if path.is_file():
        return path
    if path.exists():
        raise CheckpointError("NO_SAM", path, "expected a regular file", "name a weight file")
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix not in _SUFFIXES:
        return _from_hub(source)
    raise CheckpointError(
        "NO_SAM", path, "no such file", "check the path, or give a hub id such as facebook/sam-vit-base"
    )


def _from_hub(hub_id: str) -> Path:
    """The weight file of a hub id: out of the hub's cache on this machine, else downloaded into it."""
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RemoteEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise MissingExtraError(
            "MISSING_EXTRA", hub_id, "the hub needs huggingface_hub",
            "pip install 'autosam3d[sam]', or pass the path of a file"
        ) from None
    # A cache that may only be read is read; what is downloaded then lies in ours.
    keep = None if may_be_made(Path(constants.HF_HUB_CACHE)) else cache_folder() / "hub"
    with _quiet_hub():
        try:
            for name, folder in itertools.product(_HUB_FILES, (None, keep) if keep else (None,)):
                cached = try_to_load_from_cache(hub_id, name, cache_dir=folder)
                if isinstance(cached, str):
                    return Path(cached)
            if constants.HF_HUB_OFFLINE:
                raise _offline(hub_id, "HF_HUB_OFFLINE forbids asking the hub")
            name = _name_on_hub(hub_id)
            _log.warning("downloading %s of %s", name, hub_id)
            return Path(hf_hub_download(hub_id, name, cache_dir=keep, etag_timeout=_HUB_PATIENCE_S))
        except (GatedRepoError, RepositoryNotFoundError, HFValidationError):
            raise CheckpointError(
                "NO_SAM", hub_id, "the hub has no such model, or not for this user", _GET_A_FILE
            ) from None
        except RemoteEntryNotFoundError:
            raise CheckpointError(
                "NO_SAM", hub_id, f"the hub's model has neither {' nor '.join(_HUB_FILES)}", _GET_A_FILE
            ) from None
        except _network_faults() as error:
            raise _offline(hub_id, f"the hub cannot be reached ({type(error).__name__})") from None


def _name_on_hub(hub_id: str) -> str:
    """The first of the usual names that the hub has. Asked once and briefly: a download itself tries a hub that is
    not there again and again, for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    *others, last = _HUB_FILES
    for name in others:
        try:
            get_hf_file_metadata(hf_hub_url(hub_id, name), timeout=_HUB_PATIENCE_S)
        except RemoteEntryNotFoundError:
            continue
        return name
    get_hf_file_metadata(hf_hub_url(hub_id, last), timeout=_HUB_PATIENCE_S)
    return last


def _network_faults() -> tuple[type[Exception], ...]:
    """What the hub's client raises where there is no way to the hub; its HTTP library differs between versions."""
    from huggingface_hub.errors import FileMetadataError

    http = (getattr(sys.modules.get(name), "HTTPError", None) for name in ("httpx2", "httpx", "requests"))
    return (OSError, FileMetadataError, *(fault for fault in http if fault is not None))


def _offline(hub_id: str, fault: str) -> CheckpointError:
    from huggingface_hub import constants

    return CheckpointError(
        "OFFLINE", hub_id, f"{fault}, and its cache {constants.HF_HUB_CACHE} has no {' or '.join(_HUB_FILES)} of it",
        _GET_A_FILE,
    )


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub's own warnings and bars: what has to be said, one line of ours says."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, had_bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            enable_progress_bars()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            "MODEL_UNREADABLE", path, f"cannot be read ({error.strerror})", "check its permissions"
        ) from None


def _is_safetensors(path: Path) -> bool:
    """By content, since files get renamed: eight bytes of header length, then JSON."""
    with path.open("rb") as stream:
        head = stream.read(9)
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise _corrupt(path, f"not a whole safetensors file ({error})") from None


def _read_torch(path: Path) -> Any:
    import safetensors

    is_zip = _check_container(path)
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True if is_zip else None)
    except pickle.UnpicklingError as error:
        # The reader's own message tells how to switch its guard off: users of a clinic's tool must not be told.
        match = re.search(r"(?:GLOBAL|global|class|type) ([\w.]+)", str(error))
        if match or "Unsupported" in str(error):
            what = f" ({match[1]})" if match else ""
            raise CheckpointError(
                "UNSAFE", path, f"expected tensors only, got a file that would run code when opened{what}",
                "get the weights from their publisher, best as .safetensors",
            ) from None
        raise _corrupt(path, "the pickled part cannot be read") from None
    except safetensors.SafetensorError:
        # Newer versions of torch go by the name of the file, whatever it holds.
        raise _corrupt(path, "named as a safetensors file, and is none") from None
    except (RuntimeError, EOFError, KeyError, ValueError, IndexError, TypeError, AttributeError, OSError) as error:
        raise _corrupt(path, f"cannot be read as PyTorch weights ({type(error).__name__})") from None


def _check_container(path: Path) -> bool:
    """Refuse what is no PyTorch file; True for the zip format, whose members are checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        raise _corrupt(path, "the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise _corrupt(path, "a Git LFS pointer, not the weights themselves")
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                for member in members:
                    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                        raise _unsafe(path, f"member {member.filename!r} is compressed, which PyTorch never writes")
                if sum(member.file_size for member in members) > size:
                    raise _unsafe(path, f"its members claim more than the file's {size} bytes")
                broken = archive.testzip()
        except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, OSError) as error:
            raise _corrupt(path, f"cut off or damaged ({error})") from None
        if broken is not None:
            raise _corrupt(path, f"the checksum of {broken!r} is wrong")
        return True
    if head[:1] != b"\x80":
        raise _corrupt(path, f"neither a PyTorch nor a safetensors file (it starts with {head[:16]!r})")
    return False


def _state_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors in what a file held, one level down if need be."""
    for candidate in (content, *(content.get(key) for key in _NESTED if isinstance(content, Mapping))):
        if isinstance(candidate, Mapping) and candidate and all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in candidate.items()
        ):
            return dict(candidate)
    raise CheckpointError(
        "MISMATCH", path, f"expected tensors by name, got {type(content).__name__}", "give a SAM or MedSAM weight file"
    )


def _check_numbers(state: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in state.items():
        # A tensor of stride 0 can claim any size without holding it.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _unsafe(path, f"tensor {name} claims {tensor.numel()} numbers but does not hold them")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError("NONFINITE", path, f"{name} holds NaN or infinity", _FRESH)
        if name.endswith(".weight") and tensor.dim() > 1 and not bool(tensor.any()):
            raise CheckpointError("NONFINITE", path, f"{name} is all zero", _FRESH)


_FRESH = "get the file anew from its publisher and compare the checksum"


def _corrupt(path: Path, fault: str) -> CheckpointError:
    return CheckpointError("CORRUPT", path, fault, _FRESH)


def _unsafe(path: Path, fault: str) -> CheckpointError:
    return CheckpointError("UNSAFE", path, fault, "get the weights from their publisher, best as .safetensors")
