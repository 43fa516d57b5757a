"""Weight files: whole, broken, hostile, absent."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from autosam3d.checkpoints.sam_files import read_sam_state
from autosam3d.errors import AutoSam3dError, CheckpointError

STATE = {
    "image_encoder.pos_embed": torch.arange(6.0).view(2, 3),
    "image_encoder.blocks.0.attn.qkv.weight": torch.eye(64),
}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "sam_vit_b.pth"
    torch.save(STATE, path)
    return path


def expect(code: str, source: str | Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_sam_state(source)
    assert caught.value.code == code, str(caught.value)
    assert "weights_only" not in str(caught.value)  # no hint how to switch the guard off
    return caught.value


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "renamed safetensors", "folder", "training state"])
def test_formats_give_the_same_tensors_and_the_files_hash(kind: str, tmp_path: Path) -> None:
    path = source = tmp_path / "weights.pth"
    if kind == "zip":
        torch.save(STATE, path)
    elif kind == "legacy":
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
    elif kind == "training state":
        torch.save({"model": STATE, "epoch": 3, "optimizer": {"state": {}}}, path)
    else:
        path = source = tmp_path / {"safetensors": "a.safetensors", "folder": "model.safetensors"}.get(kind, "a.bin")
        save_file(STATE, path)
        source = tmp_path if kind == "folder" else path
    state, digest = read_sam_state(source)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_cut_files_are_corrupt(kind: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    expect("CORRUPT", path)


@pytest.mark.parametrize(
    "content",
    [b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x80", b"PK\x03\x04rest", b"\0" * 99],
)
def test_other_content_is_corrupt(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    expect("CORRUPT", path)


def test_a_flipped_byte_is_found(whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    position = data.find(torch.eye(64).numpy().tobytes())
    assert position > 0
    data[position + 1000] ^= 0x40
    whole.write_bytes(data)
    assert "checksum" in expect("CORRUPT", whole).fault


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("payload", [_Command(), {"w": torch.eye(2), "path": Path("/")}], ids=["code", "foreign"])
@pytest.mark.parametrize("new_format", [True, False])
def test_pickles_that_run_code_are_unsafe(
    payload: object, new_format: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(payload, tmp_path / "evil.pth", _use_new_zipfile_serialization=new_format)
    expect("UNSAFE", tmp_path / "evil.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(payload))
    assert expect("UNSAFE", tmp_path / "plain.pkl").remedy
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_named_safetensors_is_corrupt(tmp_path: Path) -> None:
    for payload in (STATE, _Command()):
        torch.save(payload, tmp_path / "weights.safetensors")
        expect("CORRUPT", tmp_path / "weights.safetensors")
    assert not Path("pwned").exists()


def test_compressed_members_are_unsafe(whole: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "compressed" in expect("UNSAFE", bomb).fault


def test_sizes_beyond_the_file_are_unsafe(whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    entry = data.find(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = (1 << 30).to_bytes(4, "little") * 2  # both sizes of one directory entry
    whole.write_bytes(data)
    assert "claim" in expect("UNSAFE", whole).fault


def test_a_tensor_that_claims_more_than_it_holds_is_unsafe(tmp_path: Path) -> None:
    torch.save({"pos_embed": torch.zeros(1).expand(1 << 40)}, tmp_path / "huge.pth")
    assert "claims" in expect("UNSAFE", tmp_path / "huge.pth").fault


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float, tmp_path: Path) -> None:
    bad = STATE | {"image_encoder.pos_embed": torch.tensor([1.0, value])}
    torch.save(bad, tmp_path / "bad.pth")
    assert "image_encoder.pos_embed" in expect("NONFINITE", tmp_path / "bad.pth").fault


def test_an_all_zero_matrix_is_refused(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(3, 3)}, tmp_path / "zero.pth")
    assert "all zero" in expect("NONFINITE", tmp_path / "zero.pth").fault


@pytest.mark.parametrize("content", [[torch.eye(2)], {"a": 1}, {}, torch.eye(2)])
def test_files_without_named_tensors_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    expect("MISMATCH", tmp_path / "other.pth")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    expect("NO_SAM", tmp_path / "absent.pth")
    expect("NO_SAM", "models/absent.pth")  # a path, though it looks like a hub id
    expect("NO_SAM", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    expect("NO_SAM", tmp_path / "pipe")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and nobody to ask for more."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(cache: Path, hub_id: str, name: str) -> Path:
    """A weight file as the hub lays it out: refs/main names the snapshot, whose file is a link to a blob."""
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    for part in ("refs", "blobs", "snapshots/0123abc"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text("0123abc")
    blob = folder / "blobs" / f"blob_of_{name}"
    if name.endswith(".safetensors"):
        save_file(STATE, blob)
    else:
        torch.save(STATE, blob)
    (folder / "snapshots/0123abc" / name).symlink_to(f"../../blobs/{blob.name}")
    return blob


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_cached_file_of_either_name_is_taken_without_asking_the_hub(
    name: str, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asking in ("hf_hub_download", "get_hf_file_metadata"):
        monkeypatch.setattr(f"huggingface_hub.{asking}", lambda *_, **__: pytest.fail("the hub was asked"))
    blob = put_in_cache(hub_cache, "facebook/sam-vit-base", name)
    state, digest = read_sam_state("facebook/sam-vit-base")
    assert state.keys() == STATE.keys() and digest == hashlib.sha256(blob.read_bytes()).hexdigest()


def test_offline_the_message_says_what_to_do(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = expect("OFFLINE", "facebook/sam-vit-base")
    assert "facebook/sam-vit-base" in str(error) and "HF_HUB_OFFLINE" in error.fault and str(hub_cache) in error.fault
    assert "sam_vit_b_01ec64.pth" in error.remedy and "give --sam its path" in error.remedy


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}],
                         ids=["offline", "unreachable"])
def test_without_network_a_process_says_one_line_and_soon(env: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    put_in_cache(tmp_path / "hub", "some/other-model", "pytorch_model.bin")
    code = ("import sys, logging; logging.basicConfig(level=logging.WARNING)\n"
            "from autosam3d.errors import CheckpointError\n"
            "from autosam3d.checkpoints.sam_files import read_sam_state\n"
            "import huggingface_hub, time\n"
            "print(len(read_sam_state('some/other-model')[0]))\n"
            "begun = time.monotonic()\n"
            "try: read_sam_state('facebook/sam-vit-base')\n"
            "except CheckpointError as error: print(error.code, time.monotonic() - begun)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
                          env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"} | env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    count, answer = done.stdout.splitlines()
    assert int(count) == len(STATE) and answer.startswith("OFFLINE ")
    assert float(answer.split()[1]) < 5


def test_hub_files_are_tried_in_order(hub_cache: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    asked: list[str] = []

    def ask(url: str, timeout: float) -> None:
        asked.append(url.rpartition("/")[2])
        if url.endswith("safetensors"):
            raise _hub_error("RemoteEntryNotFoundError")

    def download(repo: str, name: str, **_: object) -> str:
        asked.append(f"download {name}")
        return str(whole)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    state, _ = read_sam_state("wanglab/medsam-vit-base")
    assert asked == ["model.safetensors", "pytorch_model.bin", "download pytorch_model.bin"]
    assert state.keys() == STATE.keys()


@pytest.mark.parametrize(("name", "code"), [
    ("RepositoryNotFoundError", "NO_SAM"), ("GatedRepoError", "NO_SAM"),
    ("RemoteEntryNotFoundError", "NO_SAM"), ("HfHubHTTPError", "OFFLINE"),
    ("LocalEntryNotFoundError", "OFFLINE"), ("FileMetadataError", "OFFLINE"),
])
def test_hub_failures_have_codes(name: str, code: str, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(url: str, timeout: float) -> None:
        raise _hub_error(name)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    expect(code, "facebook/sam-vit-base")


def test_an_id_that_the_hub_cannot_have_is_not_found(hub_cache: Path) -> None:
    expect("NO_SAM", "a--b/c..d")


def _hub_error(name: str) -> Exception:
    """One of the hub's errors without the HTTP response that its constructor wants."""
    from huggingface_hub import errors

    kind = getattr(errors, name)
    return kind.__new__(kind)


def test_errors_cross_process_borders(tmp_path: Path) -> None:
    error = expect("NO_SAM", tmp_path / "absent.pth")
    stream = io.BytesIO(pickle.dumps(error))
    again = pickle.load(stream)  # noqa: S301 - our own error, just made
    assert isinstance(again, AutoSam3dError)
    assert str(again) == str(error)
