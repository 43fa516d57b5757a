"""Distil a trained teacher into the small student, export it, and segment a CT without PyTorch.

    python examples/03_distill_and_export.py TEACHER DATASET SCAN FOLDER [KEY=VALUE ...]

After example 02: TEACHER is its FOLDER/run, DATASET its FOLDER/data, SCAN one of FOLDER/data/imagesTs.
"""

import sys
from pathlib import Path

import autosam3d
from autosam3d.checkpoints.checkpoint import load_model
from autosam3d.checkpoints.exported import load_exported
from autosam3d.data.folder import open_dataset
from autosam3d.export.export import export_model
from autosam3d.training.distill import student_recipe
from autosam3d.training.train import Observer, TeacherSource, train

teacher, dataset, scan, folder = map(Path, sys.argv[1:5])

recipe = student_recipe(teacher, "edge", sys.argv[5:])  # or "tiny", "small": the paper's SwinUNETR
cases = open_dataset(dataset, recipe)
train(recipe, cases, folder / "student", teacher=TeacherSource(teacher), observer=Observer(on_message=print))

ct = autosam3d.read_ct(scan)
exported = export_model(load_model(folder / "student"), folder / "exported", ct=ct)  # refused unless outputs match
for row in exported.rows:
    print(f"{row.backend:12} {row.equal_share:.4%} of the labels equal")

model = load_exported(folder / "exported", "onnxruntime", threads=1)  # this, and all below, needs no PyTorch
organs = autosam3d.segment(ct, model)
autosam3d.write_segmentation(folder / "organs.nii.gz", organs, recipe.labels)
print(f"{len(organs.organs)} organs named, {int((organs.labels > 0).sum())} voxels of them found")
