"""From an exported model to a folder that any web server can give out: the browser app with that model in it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from autosam3d.checkpoints.exported import Export
from autosam3d.errors import CheckpointError, UsageError
from autosam3d.export.parity import BOUNDS
from autosam3d.io import folders
from autosam3d.io.room import demand_room

MARKER = "autosam3d-web.json"
"""Says that a folder is one of ours, and what is in it."""
MODEL_FOLDER = "model"
_LATER = "webgpu/"
"""What browsers load, and keep for offline use, only once a person asked for the graphics card."""
_KEPT = ("autosam3d", "format", "kind", "metrics", "memory", "weights", "use")
_BUILD_LINE = re.compile(r"^const BUILD = .*;$", re.MULTILINE)


@dataclass(frozen=True)
class WebFolder:
    """What was written."""

    folder: Path
    version: str
    """Changes with every byte of the folder, so that browsers that kept an older one take the new one."""
    sizes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())


def write_web_folder(export: Export, folder: Path, *, overwrite: bool = False) -> WebFolder:
    """The built page, the network and its description; all of it, or nothing.

    Nothing of the golden case goes in, which may be windows of a patient's scan.

    Args:
        export: whose model.onnx is taken, after its hash was compared.
        folder: new, or with `overwrite` one that this function wrote before.

    Raises:
        UsageError: OUTPUT_EXISTS; INTENSITY, a model for numbers that the page does not read.
        CheckpointError: CORRUPT or HASH, the export is damaged; NO_APP, this installation lacks the built page.
    """
    reading = export.recipe.reading
    if reading.intensity != "hu" or reading.intensity_offset:
        wish = "intensity raw" if reading.intensity == "raw" else f"intensity_offset {reading.intensity_offset:g}"
        raise UsageError("INTENSITY", export.folder, "expected a model for Hounsfield units as they are stored, which "
                         f"is all that the page reads, got one with reading.{wish}", "run it with autosam3d segment")
    demand_replaceable(folder, overwrite)
    onnx = export.path("model.onnx")
    with folders.staged_folder(folder) as stage, as_file(files("autosam3d") / "web_app") as app:
        if not (app / "index.html").is_file():
            raise CheckpointError("NO_APP", app, "expected the built page, got none", "run npm run build in web/")
        demand_room(folder, onnx.stat().st_size + sum(p.stat().st_size for p in app.rglob("*") if p.is_file()))
        shutil.copytree(app, stage, dirs_exist_ok=True)
        (stage / MODEL_FOLDER).mkdir()
        shutil.copyfile(onnx, stage / MODEL_FOLDER / "model.onnx")
        text = json.dumps(_description(export), indent=1, ensure_ascii=False) + "\n"
        (stage / MODEL_FOLDER / "model.json").write_text(text, "utf-8")
        version = _seal(stage)
        sizes = {p.relative_to(stage).as_posix(): p.stat().st_size for p in sorted(stage.rglob("*")) if p.is_file()}
    return WebFolder(folder, version, sizes)


def demand_replaceable(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything but a web folder which may be replaced.

    Raises:
        UsageError: OUTPUT_EXISTS.
    """
    folders.demand_replaceable(folder, overwrite, lambda there: (there / MARKER).is_file(), "a web export")


def _description(export: Export) -> dict[str, Any]:
    """What the page needs of model.json: no machine, no date, no settings of the training."""
    kept = {key: export.meta[key] for key in _KEPT if key in export.meta}
    return {**kept, "recipe": {"name": export.recipe.name}, "bounds": BOUNDS}


def _seal(stage: Path) -> str:
    """Tell the service worker which files to keep, and under which version."""
    names = sorted(p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0" + hashlib.sha256((stage / name).read_bytes()).digest())
    version = digest.hexdigest()[:16]
    # "./" is the page itself, as people type it.
    kept = ["./", *(f"./{name}" for name in names if name not in ("index.html", "licenses.txt", "sw.js"))]
    later = [name for name in kept if name.startswith(f"./{_LATER}")]
    build = {"version": version, "files": [name for name in kept if name not in later], "later": later}
    script = stage / "sw.js"
    line = f"const BUILD = {json.dumps(build)};"
    text, count = _BUILD_LINE.subn(lambda _: line, script.read_text("utf-8"))
    if count != 1:
        raise CheckpointError("NO_APP", script, "expected one line that names the build, got "
                              f"{count}", "run npm run build in web/")
    script.write_text(text, "utf-8")
    (stage / MARKER).write_text(json.dumps({"version": version}) + "\n", "utf-8")
    return version
