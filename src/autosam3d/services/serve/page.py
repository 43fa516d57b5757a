"""Pages for browsers: the browser app with the service's model, and a page about the API that needs no script."""

from __future__ import annotations

import html
import mimetypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

_MEDIA = {"nifti": "application/gzip", "json": "application/json", "csv": "text/csv"}
# Browsers start workers and compile WebAssembly only with the right media type, which systems map differently.
for _ending, _kind in ((".mjs", "text/javascript"), (".js", "text/javascript"), (".wasm", "application/wasm"),
                       (".webmanifest", "application/manifest+json"), (".onnx", "application/octet-stream")):
    mimetypes.add_type(_kind, _ending)

Answer = TypeVar("Answer", bound=Response)
_PIECE_BYTES = 1 << 15
_STYLE_NAME = "/docs.css"
STYLE = """\
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
article { border-top: 1px solid #8888; padding: .5rem 0 }
h2 { font-size: 1.1rem; margin: .5rem 0 }
code { font-family: ui-monospace, monospace }
table { border-collapse: collapse; width: 100% }
td { vertical-align: top; padding: .15rem .75rem .15rem 0 }
td:first-child { white-space: nowrap }
"""


def media_type(form: str) -> str:
    """The media type of a result's file."""
    return _MEDIA.get(form, "application/dicom")


class _Files(StaticFiles):
    def file_response(self, *args: Any, **how: Any) -> Response:
        return in_small_pieces(super().file_response(*args, **how))


def in_small_pieces(answer: Answer) -> Answer:
    """The answer, of whose file little is held in memory for a client that does not read it."""
    if isinstance(answer, FileResponse):
        answer.chunk_size = _PIECE_BYTES
    return answer


def static_app(folder: Path) -> StaticFiles:
    """The files of the browser app; links out of the folder are not followed."""
    return _Files(directory=folder, html=True)


def api_page(openapi: Mapping[str, Any]) -> str:
    """An OpenAPI description as an HTML page."""
    parts = []
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            parts.append(_article(method, path, operation))
    info = openapi["info"]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(info["title"])}: API</title>'
            f'<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="{_STYLE_NAME}">'
            f"<h1>{html.escape(info['title'])} {html.escape(info['version'])}: API</h1>"
            f'<p>{html.escape(info["description"])} For programs: <a href="/openapi.json">openapi.json</a>. '
            f'The <a href="/">browser app</a> segments without sending anything.</p>{"".join(parts)}</html>')


def no_app_page(reason: str) -> str:
    """The page that stands in for the browser app where there is none."""
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><title>autosam3d</title>'
            f'<link rel="stylesheet" href="{_STYLE_NAME}"><h1>autosam3d</h1><p>{html.escape(reason)}</p>'
            '<p><a href="/docs">The API</a></p></html>')


def _article(method: str, path: str, operation: Mapping[str, Any]) -> str:
    rows = [(p["name"], _parameter(p)) for p in operation.get("parameters", [])]
    kinds = ", ".join(operation.get("requestBody", {}).get("content", {}))
    if kinds:
        rows.append(("body", kinds))
    rows += [(status, answer.get("description", "")) for status, answer in operation.get("responses", {}).items()]
    cells = "".join(f"<tr><td><code>{html.escape(str(name))}</code><td>{html.escape(str(text))}" for name, text in rows)
    return (f"<article><h2><code>{method.upper()} {html.escape(path)}</code></h2>"
            f"<p>{html.escape(operation.get('summary', ''))}</p><table>{cells}</table></article>")


def _parameter(parameter: Mapping[str, Any]) -> str:
    schema = parameter.get("schema", {})
    kinds = [schema, *schema.get("anyOf", [])]
    choices = next((", ".join(map(str, kind["enum"])) for kind in kinds if "enum" in kind), "")
    kind = next((kind["type"] for kind in kinds if kind.get("type") not in (None, "null")), "")
    default = f"default {schema['default']}" if schema.get("default") is not None else ""
    return "; ".join(filter(None, [parameter["in"], choices or kind, default, parameter.get("description", "")]))
