"""A recipe: everything that makes a training run what it is, typed, checked and kept with the model.

Each dataset has one complete file in ``recipes/``; there is no inheritance. ``--set train.epochs=3`` overrides
one key. Every number is checked before any data is touched.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from autosam3d.geometry.patches import Tiling
from autosam3d.geometry.preprocess import Preprocess
from autosam3d.labels import LabelMap
from autosam3d.models.spec import (
    DEEPLY_SUPERVISED,
    AutoSamSpec,
    NnFormerSpec,
    NnUnetSpec,
    ResUnetSpec,
    SwinUnetrSpec,
    UnetrSpec,
)
from autosam3d.recipes.data_source import DataSource
from autosam3d.recipes.reading import Reading
from autosam3d.recipes.settings import (
    STRICT,
    Augment,
    Dataset,
    Distillation,
    Optim,
    Sampling,
    Training,
    demand,
)
from autosam3d.recipes.sources import read_recipe_text, recipe_names, with_model
from autosam3d.recipes.typed_tree import typed, with_overrides
from autosam3d.recipes.yaml_text import dump_yaml, parse_yaml

__all__ = ["Recipe", "dump_recipe", "load_recipe", "recipe_from_dict", "recipe_names", "with_overrides"]


def _network_of(model: Any) -> str:
    """Which kind of network a `model` section means; one that does not say is an AutoSAM."""
    network = model.get("network", "autosam") if isinstance(model, Mapping) else getattr(model, "network", "autosam")
    return network if isinstance(network, str) else repr(network)


_NETWORKS = ("autosam", "swin_unetr", "res_unet", "nnunet", "unetr", "nnformer")
_Model = Annotated[
    Annotated[AutoSamSpec, Tag("autosam")] | Annotated[SwinUnetrSpec, Tag("swin_unetr")]
    | Annotated[ResUnetSpec, Tag("res_unet")] | Annotated[NnUnetSpec, Tag("nnunet")]
    | Annotated[UnetrSpec, Tag("unetr")] | Annotated[NnFormerSpec, Tag("nnformer")],
    Discriminator(_network_of),
]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run, whole. `model.num_outputs` follows from the organs and is not written in the file."""

    __pydantic_config__ = STRICT
    name: str
    """Letters, digits, ``_``, ``-`` and ``.``: it becomes a part of file names."""
    about: str
    """One line."""
    labels: LabelMap
    dataset: Dataset
    reading: Reading = field(default_factory=Reading)
    preprocess: Preprocess
    model: _Model
    sampling: Sampling = field(default_factory=Sampling)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    train: Training = field(default_factory=Training)
    inference: Tiling = field(default_factory=Tiling)
    distill: Distillation | None = None
    """For students; None where nothing is distilled."""
    data: tuple[DataSource, ...] = ()
    """The datasets that a model of several learns from; empty where ``--data`` alone names them."""

    def __post_init__(self) -> None:
        fits = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.name) is not None
        demand(fits, "name", "1 to 64 letters, digits, _, - or .", self.name)
        demand(self.about.isprintable(), "about", "one line of text", self.about)
        demand(
            self.model.num_outputs == self.labels.num_outputs, "model.num_outputs",
            f"{self.labels.num_outputs} (organs and background)", self.model.num_outputs,
        )
        fits = not self.train.deep_supervision or self.model.network in DEEPLY_SUPERVISED
        demand(fits, "train.deep_supervision", f"false, since {self.model.network} has no coarser outputs",
                self.train.deep_supervision)
        values = (self.dataset.download and self.dataset.download.label_values) or {}
        unknown = sorted(set(values.values()) - {*self.labels.organs, "background"})
        demand(not unknown, "dataset.download.label_values", "names of organs or background", unknown)
        names = [source.name for source in self.data]
        demand(len(set(names)) == len(names), "data", "datasets of different names", names)
        for source in self.data:
            fits = source.reading is None or source.reading.intensity == self.reading.intensity
            demand(fits, f"data.{source.name}.reading.intensity", f"{self.reading.intensity}, as the recipe's reading",
                   source.reading and source.reading.intensity)
            unknown = sorted({*source.organs.values()} - {*self.labels.values, "background"})
            demand(not unknown, f"data.{source.name}.organs", "organs or super-classes of the recipe, or background",
                   unknown)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON or YAML."""
        whole = _ADAPTER.dump_python(self, mode="json", by_alias=True)
        if self.distill is None:
            del whole["distill"]
        if not self.data:
            del whole["data"]
        if not self.labels.super_classes:
            del whole["labels"]["super_classes"]
        return whole

    def digest(self, *sections: str) -> str:
        """SHA-256 of the named sections (of all, where none is named); equal settings, equal digest."""
        whole = self.as_dict()
        if self.reading == Reading() and "reading" not in sections:  # digests of versions without the section stay true
            del whole["reading"]
        part = {key: whole[key] for key in sections} if sections else whole
        return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()


_ADAPTER = TypeAdapter(Recipe)
_UNIONS = {"model": ("network", _NETWORKS)}


def load_recipe(source: str | Path, overrides: Iterable[str] = (), model: str | Path | None = None) -> Recipe:
    """A recipe by name or from a YAML file, with ``key.path=value`` overrides.

    Args:
        model: train another network on the same data: a preset by name or from a YAML file, see `recipes.sources`.

    Raises:
        RecipeError: unknown name or key (with the nearest known one), wrong type or value, unsafe YAML.
    """
    text, where = read_recipe_text(source)
    tree = parse_yaml(text, where)
    if model is not None:
        tree = with_model(tree, model)
        where = f"{where} --model {model}"
    return recipe_from_dict(with_overrides(tree, overrides), where)


def recipe_from_dict(tree: Mapping[str, Any], where: str | Path = "recipe") -> Recipe:
    """A recipe from plain values, as `Recipe.as_dict` gives them or a YAML file holds them."""
    tree = dict(tree)
    model, labels = tree.get("model"), tree.get("labels")
    if isinstance(model, Mapping) and isinstance(labels, Mapping) and isinstance(labels.get("organs"), (list, tuple)):
        tree["model"] = {"num_outputs": len(labels["organs"]) + 1} | dict(model)
    return typed(_ADAPTER, tree, where, unions=_UNIONS)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return dump_yaml(recipe.as_dict())
