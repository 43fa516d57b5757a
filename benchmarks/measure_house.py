"""The house in numbers: what lies at its top, how much its rooms know of each other, where it is long or wide.

    python benchmarks/measure_house.py [CHECKOUT ...]

prints a Markdown table with a column for each checkout, in their order; without one, for this one alone. Lines of a
function are counted from its ``def`` to its end, those of its body without the docstring and without the parameters.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
MOST_LINES, MOST_BODY, MOST_PARAMETERS = 350, 60, 8
# Of a command: a dozen options, and an argument.
MOST_OF_A_COMMAND = 13
# Who raises with a code: an exception class, or a function that makes one.
_RAISES = re.compile(r"([a-z_]*fault|[A-Za-z]*(Error|Died|Timeout))$")
_CODE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
_ARROWS = """
import json, sys, grimp
graph = grimp.build_graph("autosam3d", exclude_type_checking_imports=True, cache_dir=None)
place = lambda module: module.split(".")[1] if "." in module else "__init__"
arrows = {(place(a), place(b)) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)}
print(json.dumps(sum(a != b for a, b in arrows)))
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def measure(repo: Path) -> dict[str, str | int]:
    """The rows of the table, by name, for the checkout at `repo`."""
    package = repo / "src/autosam3d"
    texts = {path: path.read_text("utf-8") for path in sorted(package.rglob("*.py"))}
    functions = [(path, node) for path, text in texts.items() for node in ast.walk(ast.parse(text))
                 if isinstance(node, Function)]
    commands = [node for _, node in functions if is_command(node)]
    others = [(path, node) for path, node in functions if not is_command(node)]
    codes = error_codes(list(texts.values()))
    contract = (repo / ".importlinter").read_text("utf-8")
    return {
        "`.py` files at the top level": len(list(package.glob("*.py"))),
        "places at the top level (files and packages)": len(
            [p for p in package.iterdir() if p.suffix == ".py" or any(p.glob("**/*.py"))]),
        "layers of the import contract": _layers(contract),
        "exceptions to it": len(re.findall(r"->", contract)),
        "import arrows between places": _arrows(repo),
        "longest function, lines": _longest(package, functions),
        f"functions over {MOST_BODY} lines": sum((n.end_lineno or 0) - n.lineno >= MOST_BODY for _, n in functions),
        f"functions with a body over {MOST_BODY} lines": sum(body_lines(n) > MOST_BODY for _, n in functions),
        "widest parameter list": _widest(package, functions),
        "widest of a function that is no command": _widest(package, others),
        f"functions with more than {MOST_PARAMETERS} parameters": sum(width(n) > MOST_PARAMETERS for _, n in functions),
        f"commands with more than {MOST_OF_A_COMMAND} parameters (a dozen options, an argument)": sum(
            width(n) > MOST_OF_A_COMMAND for n in commands),
        f"files over {MOST_LINES} lines": sum(text.count("\n") > MOST_LINES for text in texts.values()),
        "longest file, lines": max(text.count("\n") for text in texts.values()),
        "error codes": len(codes),
        "error codes that several classes raise": sum(
            len({name for name in names if name[0].isupper()}) > 1 for names in codes.values()),
        "lines of ARCHITECTURE.md": (repo / "ARCHITECTURE.md").read_text("utf-8").count("\n"),
        "Python files, lines": f"{len(texts)}, {sum(text.count(chr(10)) for text in texts.values())}",
    }


def body_lines(function: Function) -> int:
    """Lines below the signature, less the docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def width(function: Function) -> int:
    """Parameters, less ``self`` and ``cls``."""
    args = function.args
    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def is_command(function: Function) -> bool:
    """Whether the parameters are a command line's: annotated with Typer's options."""
    return any(a.annotation is not None and "typer." in ast.unparse(a.annotation)
               for a in (*function.args.args, *function.args.kwonlyargs))


def error_codes(texts: list[str]) -> dict[str, set[str]]:
    """Code to the names that raise it, of all codes that stand as a literal first argument."""
    found: dict[str, set[str]] = defaultdict(set)
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                code = node.args[0].value
                if _RAISES.match(name) and isinstance(code, str) and _CODE.fullmatch(code):
                    found[code].add(name)
    return found


def _layers(contract: str) -> int:
    """Rows of the first contract of layers."""
    block = contract.split("layers =", 1)[1]
    return len([line for line in re.split(r"\n(?=\S)", block)[0].splitlines() if line.strip()])


def _arrows(repo: Path) -> int:
    """Ordered pairs of top-level places of which the one imports the other, in import-linter's own graph."""
    done = subprocess.run([sys.executable, "-c", _ARROWS], cwd=repo / "src", check=True, capture_output=True, text=True,
                          env={"PYTHONPATH": str(repo / "src"), "PATH": "/usr/bin:/bin"})
    return int(json.loads(done.stdout))


def _longest(package: Path, functions: list[tuple[Path, Function]]) -> str:
    path, node = max(functions, key=lambda f: (f[1].end_lineno or 0) - f[1].lineno)
    return f"{(node.end_lineno or 0) - node.lineno + 1} (`{path.relative_to(package)}` {node.name})"


def _widest(package: Path, functions: list[tuple[Path, Function]]) -> str:
    path, node = max(functions, key=lambda f: width(f[1]))
    return f"{width(node)} (`{path.relative_to(package)}` {node.name})"


def main() -> None:
    repos = [Path(word).resolve() for word in sys.argv[1:]] or [REPO]
    columns = [measure(repo) for repo in repos]
    heads = [subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=repo, capture_output=True, text=True,
                            check=False).stdout.strip() or "?" for repo in repos]
    print(f"| | {' | '.join(heads)} |\n|---|{'---|' * len(repos)}")
    for row in columns[0]:
        print(f"| {row} | {' | '.join(str(column[row]) for column in columns)} |")


if __name__ == "__main__":
    main()
