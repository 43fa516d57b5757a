"""How to run an exported network without this package, in plain words and numbers: goes into its model.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autosam3d.checkpoints.targets import MOBILE
from autosam3d.recipes.recipe import Recipe

_MOBILE_USE = {
    "litert": "one input, one output: logits; weights stored as float16, computed in float32",
    "executorch": "method forward: ct to logits; method labels: the classes; for the XNNPACK backend; float32",
    "coreml": "input ct, output logits; float32; written and never run: compare with golden.npz before use",
}


def describe_use(recipe: Recipe, opset: int, mobile: Sequence[str] = (), int8: bool = False) -> dict[str, Any]:
    """Everything that comes before and after the network. Axes are [z, y, x] throughout.

    Args:
        recipe: of the model.
        opset: of the ONNX file.
        mobile: targets of `MOBILE` that lie beside it.
        int8: whether an INT8 network lies beside it.
    """
    pre, labels, size = recipe.preprocess, recipe.labels, list(recipe.model.patch_size)
    window, is_raw = pre.hu_window, recipe.reading.intensity == "raw"
    widest = f"{min(-1024.0, window.low_hu):g}..{max(3071.0, window.high_hu):g}{'' if is_raw else ' HU'}"
    crops, spacing = pre.crop_to_body and not is_raw, None if pre.spacing_mm is None else list(pre.spacing_mm)
    return {
        "what": "3D organ segmentation of CT; for research, not a medical device",
        "axes": "arrays are [z, y, x]: z grows to the head, y to the front, x to the patient's right",
        "steps": [
            "take the numbers as they are stored, which are no Hounsfield units, and bring the axes into that order"
            if is_raw else "read the CT in Hounsfield units and bring its axes into that order",
            "crop to the body where crop_to_body is true: any box that holds the whole patient will do; outside it "
            "everything is background" if crops else "keep the whole scan",
            f"clip to {widest}, then resample linearly to spacing_mm, both grids covering the same cuboid corner "
            "on corner: m = max(1, round(n * spacing / target)) voxels an axis, and prepared index j lies at native "
            "index (j + 0.5) * n / m - 0.5" if spacing else "keep the scan's own spacing",
            "clip to hu_window, subtract subtract_hu, divide by divide_hu",
            "where an axis is shorter than the patch, pad both ends with the value `air`",
            "cut overlapping windows of the patch size: ceil((n - p) / step) + 1 windows an axis, step = floor(p * "
            "(1 - overlap)), spread evenly, the last one flush with the border",
            "run each window; average the probabilities of overlapping windows, weighted by `importance`",
            "interpolate the probabilities linearly on the scan's grid, then take the largest; among equals the lowest "
            "label",
        ],
        "onnx": {"file": "model.onnx", "opset": opset, "precision": "weights stored as float16, computed in float32"},
        "openvino": {"files": ["openvino.xml", "openvino.bin"], "inference_precision": "f32: bf16 and f16 hints are "
                     "slower on CPUs and less exact"},
        **({"openvino_int8": {"files": ["openvino_int8.xml", "openvino_int8.bin"], "note": "another network within the "
                              "bounds of certificate.md; the same input and outputs"}} if int8 else {}),
        **{target: {"file": MOBILE[target], "how": _MOBILE_USE[target]} for target in mobile},
        "input": {"name": "ct", "type": "float32", "shape": [1, 1, *size]},
        "outputs": {"logits": [1, labels.num_outputs, *size], "probs": "softmax of logits over axis 1; files for "
                    "phones give logits alone"},
        "patch": size,
        "spacing_mm": spacing,
        "crop_to_body": crops,
        "hu_window": [window.low_hu, window.high_hu],
        "subtract_hu": pre.subtract_hu,
        "divide_hu": pre.divide_hu,
        "air": pre.air,
        "overlap": recipe.inference.overlap,
        "importance": "gaussian: product over the axes of exp(-0.5 * ((i - (n - 1) / 2) / (n / 8)) ** 2), divided by "
        "its largest value, 0.001 at least" if recipe.inference.importance == "gaussian" else "constant: 1",
        "labels": [
            {"value": 0, "name": "background"},
            *({"value": i, "name": name, "rgb": list(labels.color(i)), "snomed": labels.snomed(i)}
              for i, name in labels.by_index.items()),
        ],
        "side_pairs": [list(pair) for pair in labels.side_pairs],
        "golden": "golden.npz: ct float16 [n, 1, D, H, W]; logits int16 at every second voxel, times scale / 32767; "
        "labels uint8 of PyTorch with the weights as trained",
    }
