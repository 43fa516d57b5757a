"""A foreign ONNX file, looked through before any runtime sees it: the file alone, no code, no other file.

An ONNX file may name other files to read (external data), operators of other libraries, and graphs inside graphs. Ours
have none of it. Only the skeleton of the protobuf is read, with bounds on everything; no package is needed for it.

*Source* of the field numbers: onnx.proto3 of ONNX 1.21; of the wire format: protobuf's encoding guide.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autosam3d.errors import CheckpointError

MAX_ONNX_BYTES = 2 << 30
"""What protobuf can hold."""
OPSETS = range(18, 24)
_MAX_DEPTH = 16
# Message to its fields that hold messages worth looking into.
_CHILDREN = {
    "model": {7: "graph", 8: "opset", 14: "entry"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
}
# Message to its fields that no file of ours has.
_REFUSED = {
    "model": {20: "training information", 25: "functions"},
    "attribute": {6: "a graph inside a graph", 11: "graphs inside a graph"},
    "tensor": {13: "external data", 14: "external data"},
}


@dataclass
class OnnxFacts:
    """What the skeleton says."""

    opset: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    """The file's metadata: key to value."""


def demand_self_contained(content: bytes, where: Path) -> OnnxFacts:
    """Refuse an ONNX file that is not whole in itself.

    Raises:
        CheckpointError: MODEL_TOO_LARGE, CORRUPT (not the protobuf of a model), UNSAFE (external data, foreign
            operators, graphs inside graphs, functions) or OPSET.
    """
    if len(content) > MAX_ONNX_BYTES:
        raise CheckpointError("MODEL_TOO_LARGE", where, f"expected at most 2 GiB, got {len(content)} bytes",
                              "take another model")
    facts, seen = OnnxFacts(), set[str]()
    for kind, message in _messages(memoryview(content), "model", where):
        seen.add(kind)
        if kind == "opset":
            parts = dict(_fields(message, where))
            domain = _text(parts.get(1, b""))
            if domain in ("", "ai.onnx"):
                version = parts.get(2, 0)
                facts.opset = version if isinstance(version, int) else 0
        elif kind == "entry":
            parts = dict(_fields(message, where))
            facts.notes[_text(parts.get(1, b""))] = _text(parts.get(2, b""))
        elif kind == "node":
            domain = _text(dict(_fields(message, where)).get(7, b""))
            if domain not in ("", "ai.onnx"):
                raise _unsafe(where, f"operators of {domain[:40]!r}")
    if not {"graph", "node", "opset"} <= seen:
        raise CheckpointError("CORRUPT", where, "expected an ONNX model, got something else or a part of one",
                              "copy the file again")
    if facts.opset not in OPSETS:
        raise CheckpointError("OPSET", where, f"expected opset {OPSETS.start} to {OPSETS.stop - 1}, got {facts.opset}",
                              "export the model again with this version of autosam3d")
    return facts


def demand_labels(note: str, labels: Sequence[str], where: Path) -> None:
    """Refuse a graph whose own list of classes is not `labels`.

    Args:
        note: what the graph says, `labels_note` of its classes.
        labels: those of the recipe, background first.

    Raises:
        CheckpointError: MISMATCH, with both lists.
    """
    try:
        got = json.loads(note)
    except (ValueError, RecursionError):
        got = None
    if got != list(labels):
        listed = "unnamed classes"
        if isinstance(got, list):
            listed = f"{len(got)}, {', '.join(str(n)[:40] for n in got[:64])}"
        raise CheckpointError("MISMATCH", where, f"expected a network of {len(labels)} classes, {', '.join(labels)}; "
                              f"got one of {listed}", "export the model again, or copy the whole folder again")


def labels_note(labels: Sequence[str]) -> str:
    """What a graph says of its channels, so that it can be told from another network's."""
    return json.dumps(list(labels))


def _messages(buffer: memoryview, kind: str, where: Path, depth: int = 0) -> Iterator[tuple[str, memoryview]]:
    """`buffer` and all messages in it that count, each with its kind."""
    if depth > _MAX_DEPTH:
        raise _unsafe(where, "messages nested without end")
    yield kind, buffer
    children, refused = _CHILDREN.get(kind, {}), _REFUSED.get(kind, {})
    if not children and not refused:
        return
    for number, value in _fields(buffer, where):
        if number in refused and value != 0:  # data_location 0 is the default: inside
            raise _unsafe(where, refused[number])
        if number in children:
            if not isinstance(value, memoryview):
                raise _corrupt(where)
            yield from _messages(value, children[number], where, depth + 1)


def _fields(buffer: memoryview, where: Path) -> Iterator[tuple[int, memoryview | int]]:
    """(field number, bytes or number) of a message, in order."""
    position, end = 0, len(buffer)
    while position < end:
        key, position = _varint(buffer, position, where)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(buffer, position, where)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(buffer, position, where)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _corrupt(where)
        if size > end - position:
            raise _corrupt(where)
        yield number, buffer[position : position + size]
        position += size


def _varint(buffer: memoryview, position: int, where: Path) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(buffer):
            break
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _corrupt(where)


def _text(value: memoryview | bytes | int) -> str:
    return bytes(value).decode("utf-8", errors="replace") if not isinstance(value, int) else str(value)


def _corrupt(where: Path) -> CheckpointError:
    return CheckpointError("CORRUPT", where, "expected an ONNX model, got something else or a part of one",
                           "copy the file again")


def _unsafe(where: Path, what: str) -> CheckpointError:
    return CheckpointError("UNSAFE", where, f"expected one file that is whole in itself, got {what}",
                           "take a file that `autosam3d export` wrote")
