"""What `import autosam3d` offers: stated, loaded late, documented, and told in one line each."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import autosam3d
from autosam3d import errors
from autosam3d.labels import LabelMap
from autosam3d.volume import Segmentation, Volume
from serving import phantom_ct

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs/python-api.md").read_text("utf-8")
SURFACE = {name: getattr(autosam3d, name) for name in autosam3d.__all__}
FUNCTIONS = [name for name, value in SURFACE.items() if inspect.isfunction(value)]
DATA = [name for name, value in SURFACE.items() if dataclasses.is_dataclass(value)]


def test_the_surface_is_sorted_and_every_name_has_a_home() -> None:
    assert autosam3d.__all__ == sorted(autosam3d.__all__)
    assert set(autosam3d.__all__) == {*autosam3d._HOMES, "__version__"}
    for name, value in SURFACE.items():
        assert name == "__version__" or value.__name__ == name


def test_dir_is_the_surface_and_dunders() -> None:
    listed = dir(autosam3d)
    assert listed == sorted(listed)
    assert {n for n in listed if not n.startswith("__")} | {"__version__"} == set(autosam3d.__all__)
    assert all(n.endswith("__") for n in listed if n.startswith("_"))


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_modl'"):
        autosam3d.load_modl  # type: ignore[attr-defined]  # noqa: B018


def test_all_errors_belong_to_it() -> None:
    tree = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert tree <= set(autosam3d.__all__)


def test_importing_the_package_and_asking_for_its_names_loads_nothing() -> None:
    code = ("import sys; before = set(sys.modules); import autosam3d; dir(autosam3d); autosam3d.__version__; "
            "new = {name for name in set(sys.modules) - before if sys.modules[name] is not None}; "
            "print(*sorted(name for name in new if name.partition('.')[0] not in sys.stdlib_module_names))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["autosam3d", "autosam3d.version"]


def test_the_page_states_the_surface() -> None:
    rows = "\n".join(re.findall(r"^\| .*\|$", PAGE, re.MULTILINE))
    stated = {name.partition("(")[0] for name in re.findall(r"^\| `([^`]+)`", rows, re.MULTILINE)}
    inside = set(re.findall(r"`(\w+Error)`", rows))
    assert stated | inside == set(autosam3d.__all__)
    for call in re.findall(r"^\| `(\w+\([^`]*\))`", rows, re.MULTILINE):
        name, _, given = call[:-1].partition("(")
        parameters = list(inspect.signature(SURFACE[name]).parameters)
        assert [word.strip() for word in given.split(",")] == parameters[: given.count(",") + 1], call


def test_the_page_s_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    phantom_ct(tmp_path / "scan.nii.gz")
    (tmp_path / "example.py").write_text(example, "utf-8")
    runpy.run_path("example.py", run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    (said,) = re.findall(r"print\(ct\)  # (.*)", example)
    assert printed[0] == said
    assert [line.split()[0] for line in printed[1:]] == list(autosam3d.load_model().recipe.labels.organs)
    assert (tmp_path / "organs.nii.gz").is_file()


def _section(doc: str, name: str) -> str:
    found = re.search(rf"^{name}:\n((?:[ \t]+.*\n|\n)*)", doc + "\n", re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    function, doc = SURFACE[name], inspect.getdoc(SURFACE[name]) or ""
    heads = " ".join(re.findall(r"^    ([\w, ]+):", _section(doc, "Args"), re.MULTILINE)).replace(",", " ").split()
    signature = inspect.signature(function)
    assert heads == list(signature.parameters)
    assert bool(_section(doc, "Returns")) == (signature.return_annotation not in (None, "None"))
    assert re.search(r"^    \w+Error:", _section(doc, "Raises"), re.MULTILINE), "every public function may fail"


@pytest.mark.parametrize("name", DATA)
def test_a_class_says_what_each_field_is(name: str) -> None:
    kind = SURFACE[name]
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    told = set(re.findall(r"^    (\w+):", inspect.getdoc(kind) or "", re.MULTILINE))
    for field, after in zip(body.body, [*body.body[1:], None], strict=True):
        text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and text:
            told.add(field.target.id)
        if isinstance(field, ast.FunctionDef) and not field.name.startswith("_"):
            assert ast.get_docstring(field), f"{name}.{field.name}"
    assert {field.name for field in dataclasses.fields(kind)} <= told


AFFINE = np.diag([0.9765625, 0.9765625, 2.5, 1.0])


@pytest.mark.parametrize(("value", "line"), [
    (Volume(np.zeros((2, 3, 4), np.float32), AFFINE, name="/archive/DOE^JOHN/scan.nii.gz"),
     "Volume(scan.nii.gz, 2 x 3 x 4 voxels of 2.5 x 0.9766 x 0.9766 mm [z, y, x])"),
    (Volume(np.zeros((1, 1, 1), np.float32), np.eye(4)), "Volume(scan, 1 x 1 x 1 voxels of 1 x 1 x 1 mm [z, y, x])"),
    (Segmentation(np.zeros((2, 3, 4), np.uint8), AFFINE, organs={1: "liver", 7: "spleen"}),
     "Segmentation(2 x 3 x 4 voxels of 2.5 x 0.9766 x 0.9766 mm [z, y, x], 2 organs: liver, spleen)"),
    (Segmentation(np.zeros((1, 1, 1), np.uint8), np.eye(4), organs=dict(enumerate("abcdef", 1))),
     "Segmentation(1 x 1 x 1 voxels of 1 x 1 x 1 mm [z, y, x], 6 organs: a, b, c, d, e, ...)"),
    (Segmentation(np.zeros((1, 1, 1), np.uint8), np.eye(4)),
     "Segmentation(1 x 1 x 1 voxels of 1 x 1 x 1 mm [z, y, x], no organ names)"),
    (LabelMap(organs=("liver",)), "LabelMap(organs=('liver',), side_pairs=())"),
])
def test_a_value_is_one_readable_line(value: object, line: str) -> None:
    assert repr(value) == line


def test_the_model_of_the_package_is_one_readable_line() -> None:
    assert repr(autosam3d.load_model()) == (
        "LoadedModel(recipe openkbp_tiny, swin_unetr with 4,078,116 parameters on cpu, 5 organs: brainstem, "
        "spinal_cord, parotid_right, parotid_left, mandible)")
