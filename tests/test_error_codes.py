"""docs/error-codes.md lists every code that is raised, with its class and its exit code, and nothing else."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from autosam3d import errors
from autosam3d.services.serve.faults import ServiceFault

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs/error-codes.md").read_text("utf-8")
TREES = {path: ast.parse(path.read_text("utf-8")) for path in sorted((REPO / "src/autosam3d").rglob("*.py"))}
CALLS = [(path, node) for path, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
HTTP = "ServiceFault"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the page."""
    section = re.split(r"^## ", PAGE, flags=re.M)[1:]
    (text,) = (part for part in section if part.startswith(heading))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()
            if re.match(r"\| `", line)]


def name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def classes() -> dict[str, str]:
    """Every exception class that carries a code: its name, and its exit code or HTTP."""
    found = {name: str(kind.exit_code) for name, kind in vars(errors).items()
             if isinstance(kind, type) and issubclass(kind, errors.AutoSam3dError)} | {HTTP: "HTTP"}
    defined = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while more := {node.name: found[base] for node in defined for base in map(name_of, node.bases)
                   if base in found and node.name not in found}:
        found |= more
    return found


CLASSES = classes()


def functions_around(path: Path, node: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions that a node stands in, the innermost first."""
    around = [function for function in ast.walk(TREES[path]) if isinstance(function, FUNCTIONS)
              and any(inner is node for inner in ast.walk(function))]
    return sorted(around, key=lambda f: f.lineno, reverse=True)


def codes_of(value: ast.expr | None, path: Path, call: ast.Call) -> Iterator[str]:
    """The words that an argument of `call` can be.

    An error that is raised anew with the code of another one brings no word of its own.
    """
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.IfExp):
        yield from codes_of(value.body, path, call)
        yield from codes_of(value.orelse, path, call)
    elif isinstance(value, ast.Name):
        sources = list(sources_of(value.id, path, call))
        assert sources, f"{path}:{call.lineno}: where does {value.id} come from?"
        for source, there, caller in sources:
            yield from codes_of(source, there, caller)
    else:
        told = (isinstance(value, ast.Attribute) and value.attr == "code") or (
            isinstance(value, ast.Subscript) and ast.unparse(value.slice) == "'code'")
        assert told, f"{path}:{call.lineno}: which code is {value and ast.unparse(value)}?"


def sources_of(name: str, path: Path, call: ast.Call) -> Iterator[tuple[ast.expr, Path, ast.Call]]:
    """What a variable can hold: what the callers of its function give, or what is assigned to it."""
    for function in functions_around(path, call):
        parameters = [argument.arg for argument in function.args.args]
        if name in parameters:
            place = parameters.index(name) - (parameters[0] in ("self", "cls"))
            for there, caller in CALLS:
                if name_of(caller.func) == function.name:
                    named = [keyword.value for keyword in caller.keywords if keyword.arg == name]
                    yield (named[0] if named else caller.args[place]), there, caller
            return
        for step in ast.walk(function):
            if isinstance(step, ast.Assign):
                (target,) = step.targets
                if isinstance(target, ast.Name) and target.id == name:
                    yield step.value, path, call
                elif isinstance(target, ast.Tuple) and name in map(ast.unparse, target.elts):
                    for value in returned(step.value, path):
                        yield value.elts[list(map(ast.unparse, target.elts)).index(name)], path, call


def returned(value: ast.expr, path: Path) -> Iterator[ast.Tuple]:
    """The tuples that a call of a function of the same file can return."""
    for function in ast.walk(TREES[path]):
        if isinstance(value, ast.Call) and isinstance(function, FUNCTIONS) and function.name == name_of(value.func):
            for step in ast.walk(function):
                if isinstance(step, ast.Return) and isinstance(step.value, ast.Tuple):
                    yield step.value


def raised() -> dict[str, set[tuple[str, str]]]:
    """Code to the classes that carry it, each with its exit code or HTTP status."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for path, call in CALLS:
        kind = name_of(call.func)
        if kind in CLASSES:
            status = CLASSES[kind]
            place = int(kind == HTTP)
            if kind == HTTP:
                assert isinstance(call.args[0], ast.Constant), f"{path}:{call.lineno}: which status?"
                status = f"HTTP {call.args[0].value}"
            for code in codes_of(call.args[place], path, call):
                found[code].add((kind, status))
        # What the command line prints of failures that are no exceptions of ours.
        for argument in call.args:
            line = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
            if isinstance(line, ast.Constant) and isinstance(line.value, str):
                for code in re.findall(r"^error\[([A-Z_]+)\]", line.value):
                    (exit_code,) = (a.value for a in call.args
                                    if isinstance(a, ast.Constant) and isinstance(a.value, int))
                    found[code].add(("", str(exit_code)))
    for status in range(400, 600):
        fault = ServiceFault.of_status(status)
        found[fault.code].add((HTTP, "HTTP, any other" if fault.code == "REFUSED" else f"HTTP {status}"))
    return dict(found)


RAISED = raised()


def test_a_code_belongs_to_one_class() -> None:
    several = {code: kinds for code, kinds in RAISED.items() if len({kind for kind, _ in kinds if kind}) > 1
               or len({status for _, status in kinds}) > 1}
    assert several == {}


def test_the_page_lists_every_code_and_no_other() -> None:
    listed = [row[0].strip("`") for row in rows("Codes")]
    assert listed == sorted(RAISED)
    assert len(listed) > 150


def test_the_page_names_the_class_and_the_exit_code() -> None:
    told = {row[0].strip("`"): (row[1].strip("`"), row[2]) for row in rows("Codes")}
    for code, kinds in RAISED.items():
        (status,) = {status for _, status in kinds}
        named = {kind for kind, _ in kinds if kind}
        assert told[code][1] == status, code
        assert not named or {told[code][0]} == named, code
        assert told[code][0] in CLASSES, code


def test_meaning_and_remedy_are_sentences() -> None:
    for code, _, _, meaning, remedy in rows("Codes"):
        for sentence in (meaning, remedy):
            assert re.match(r"[A-Z`/]", sentence), code
            assert re.search(r"[.]$", sentence), code
    meanings = [row[3] for row in rows("Codes")]
    assert len(set(meanings)) == len(meanings)


def test_the_service_answers_errors_of_the_library_as_the_page_says() -> None:
    (text,) = re.findall(r"The service answers .*?(?=\n\n)", PAGE, re.S)
    text = " ".join(text.split())
    of_exit = {int(number): int(status) for numbers, status in re.findall(r"exit (\d(?: and \d)?) with (\d{3})", text)
               for number in re.findall(r"\d", numbers)}
    for kind in (errors.UsageError, errors.VolumeError, errors.CheckpointError, errors.ResourceError):
        assert ServiceFault.of(kind("ANY", "", "", "")).status == of_exit[kind.exit_code]
    of_code = {code: int(status) for codes, status in re.findall(r"((?:`[A-Z_]+`(?:, | and | ))+)with (\d{3})", text)
               for code in re.findall(r"[A-Z_]+", codes)}
    assert set(of_code) == {"NO_SPACE", "IO", "NOT_WRITABLE", "WORKER_DIED", "TIMEOUT", "MEMORY"}
    for code, status in of_code.items():
        assert ServiceFault.of(errors.ResourceError(code, "", "", "")).status == status


def test_the_browser_says_the_same_codes() -> None:
    sources = [path.read_text("utf-8") for path in sorted((REPO / "web/src").rglob("*.ts"))]
    said = {code for text in sources for code in re.findall(r'AppError\(\s*"([A-Z_0-9]+)"', text)}
    own = [row[0].strip("`") for row in rows("In the browser alone")]
    assert own == sorted(said - set(RAISED))
    assert len(said & set(RAISED)) > 40
