"""Settings from a file, ``--set`` and options: who wins, and what a fault says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import ConfigDict

from autosam3d.errors import RecipeError
from autosam3d.recipes.settings_file import Words, read_settings
from autosam3d.recipes.typed_tree import demand


@dataclass(frozen=True, kw_only=True)
class Inner:
    __pydantic_config__ = ConfigDict(extra="forbid")
    words: Words = ("CT",)
    count: int = 1

    def __post_init__(self) -> None:
        demand(self.count >= 0, "count", "0 or more", self.count)


@dataclass(frozen=True, kw_only=True)
class Outer:
    __pydantic_config__ = ConfigDict(extra="forbid")
    hours: float = 1.0
    place: Path | None = None
    on: bool = True
    inner: Inner = field(default_factory=Inner)


def read(tmp_path: Path, text: str | None, *overrides: str, **options: object) -> Outer:
    path = tmp_path / "s.yaml"
    if text is not None:
        path.write_text(text, "utf-8")
    named = {f"--{name}": (name.replace("__", "."), value) for name, value in options.items()}
    return read_settings(Outer, path if text is not None else None, overrides, named, guide="docs/s.yaml")


def test_an_option_wins_over_set_and_set_over_the_file(tmp_path: Path) -> None:
    assert read(tmp_path, None) == Outer()
    assert read(tmp_path, "# nothing\n") == Outer()
    text = "hours: 2\nplace: a/b\ninner:\n  words: MR\n  count: 3\n"
    assert read(tmp_path, text) == Outer(hours=2.0, place=Path("a/b"), inner=Inner(words=("MR",), count=3))
    assert read(tmp_path, text, "hours=5", "inner.count=4").hours == 5
    both = read(tmp_path, text, "inner.count=4", hours=7.5, inner__words=["PT", "CT"], place=Path("c"), on=None)
    assert both == Outer(hours=7.5, place=Path("c"), inner=Inner(words=("PT", "CT"), count=4))
    assert read(tmp_path, "inner: null\n", inner__count=2) == Outer(inner=Inner(count=2))


def test_set_and_an_option_may_say_the_same_but_no_two_things(tmp_path: Path) -> None:
    assert read(tmp_path, None, "hours=2.0", hours=2.0).hours == 2
    with pytest.raises(RecipeError, match=r"--hours 3.0: expected one value for hours, got another by --set hours=2"):
        read(tmp_path, None, "hours=2", hours=3.0)


@pytest.mark.parametrize(("text", "overrides", "options", "code", "where", "words"), [
    ("hour: 2", (), {}, "UNKNOWN_KEY", "s.yaml: hour", "did you mean hours?"),
    ("inner: {cuont: 2}", (), {}, "UNKNOWN_KEY", "s.yaml: inner.cuont", "did you mean inner.count?"),
    ("hours: long", (), {}, "BAD_VALUE", "s.yaml: hours", "got 'long'"),
    ("hours: .nan", (), {}, "BAD_VALUE", "s.yaml: hours", "expected a finite number"),
    ("inner: {words: 3}", (), {}, "BAD_VALUE", "s.yaml: inner.words", "expected a word or a list of words, got 3"),
    ("inner: {count: 2}", ("inner.count=-1",), {}, "BAD_VALUE", "--set: inner.count", "expected 0 or more, got -1"),
    ("inner: {count: -2}", ("inner.words=MR",), {}, "BAD_VALUE", "s.yaml: inner.count", "expected 0 or more, got -2"),
    (None, (), {"inner__count": -3}, "BAD_VALUE", "--inner__count: inner.count", "expected 0 or more, got -3"),
    (None, ("on",), {}, "OVERRIDE", "--set on", "expected KEY.PATH=VALUE"),
    ("hours: [1", (), {}, "YAML", "s.yaml", "line"),
    ("- hours", (), {}, "YAML", "s.yaml", "see the example in docs/s.yaml"),
])
def test_a_fault_names_its_place_and_key(
    tmp_path: Path, text: str | None, overrides: tuple[str, ...], options: dict[str, object], code: str, where: str,
    words: str,
) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text, *overrides, **options)
    assert caught.value.code == code and caught.value.exit_code == 2
    assert caught.value.where.endswith(where) and words in str(caught.value)


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * ((1 << 20) + 1))
    odd = tmp_path / "odd.yaml"
    odd.write_bytes(b"place: \xff")
    for path in (tmp_path, tmp_path / "none.yaml", large, odd):
        with pytest.raises(RecipeError) as caught:
            read_settings(Outer, path, guide="docs/s.yaml")
        assert caught.value.where == str(path)
