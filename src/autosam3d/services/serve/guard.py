"""The checks that every request passes first (Host, Origin, token), and the headers that every answer gets."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autosam3d.services.addresses import is_loopback
from autosam3d.services.serve.faults import ServiceFault
from autosam3d.services.serve.settings import ServeSettings

_log = logging.getLogger(__name__)

OPEN = ("/health", "/auth/", "/auth", "/auth/token")
"""Paths that need no token: for monitoring, and for clients that ask whether a token is needed."""
_SAFE = ("GET", "HEAD", "OPTIONS")
_MAX_RANGES, _MAX_HEADERS = 8, 200
_HOST = re.compile(r"(\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9._-]{1,253}))(:[0-9]{0,5})?")
_PAGE = {
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy":
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self' data: blob:; "
        "img-src 'self' data: blob:; style-src 'self'; font-src 'self' data:; manifest-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """Wraps the application: request id, Host, Origin, token, headers of the answer, and one log line without names."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings
        self._names = {host_name(name) or name.lower() for name in settings.allow_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        began, status, body_is_whole = time.monotonic(), 0, not _has_body(scope)

        async def take() -> Message:
            nonlocal body_is_whole
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                body_is_whole = True
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _PAGE.items():
                    headers.setdefault(name, value)
                headers["x-request-id"] = request_id
                if not body_is_whole:
                    headers["connection"] = "close"  # otherwise uvicorn goes on to receive the body for ever
                if self._settings.token is not None or not _is_static(scope):
                    headers["cache-control"] = "no-store"
            await send(message)

        fault = self._refusal(scope)
        if fault is not None:
            await refuse(fault, request_id, answer, _challenge(fault))
        else:
            _drop_many_ranges(scope)
            await self._app(scope, take, answer)
        # The route without path and query: who knows a job's id may see its result.
        route = getattr(scope.get("route"), "path", "-")
        _log.info("request %s: %s %s %d in %.0f ms", request_id, scope["method"], route, status,
                  1000 * (time.monotonic() - began))

    def _refusal(self, scope: Scope) -> ServiceFault | None:
        headers = Headers(scope=scope)
        if len(scope["headers"]) > _MAX_HEADERS:
            return ServiceFault(431, "HEADERS", f"expected at most {_MAX_HEADERS} headers")
        if not self._is_our_name(headers.getlist("host"), scope):
            return ServiceFault(403, "HOST", "the service is not known by this name; start it with --allow-host NAME")
        if not _is_our_page(headers, scope["method"]):
            return ServiceFault(403, "ORIGIN", "requests from the pages of other sites are refused")
        token = self._settings.token
        shown = shown_token(headers.get("authorization", ""))
        if token is not None and scope["path"] not in OPEN and not is_token(shown, token):
            return ServiceFault(401, "TOKEN", "expected Authorization: Bearer with the service's token")
        return None

    def _is_our_name(self, hosts: list[str], scope: Scope) -> bool:
        """Refuse DNS rebinding: a page whose host name was made to resolve to this machine sends that name."""
        if len(hosts) != 1:
            return False
        name = host_name(hosts[0])
        if name is None:
            return False
        if name in self._names:
            return True
        local = str((scope.get("server") or ("",))[0])
        if is_loopback(local) and is_loopback(name):
            return True
        try:
            return ipaddress.ip_address(name) == ipaddress.ip_address(local.partition("%")[0])
        except ValueError:
            return False


async def refuse(fault: ServiceFault, request_id: str, send: Send, more: Sequence[tuple[str, str]] = ()) -> None:
    """Answer with an error, without the application."""
    body = json.dumps(fault.body(request_id)).encode()
    headers = [("content-type", "application/json"), ("content-length", str(len(body))), *fault.headers.items(), *more]
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": fault.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def shown_token(authorization: str) -> str:
    """The token in an Authorization header: of Bearer, or the password of Basic, which browsers ask for; else ""."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("ascii").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def is_token(shown: str, token: str) -> bool:
    """Whether a token is right, compared in a time that does not depend on how much of it is."""
    return secrets.compare_digest(shown.encode("utf-8", errors="replace"), token.encode())


def _challenge(fault: ServiceFault) -> Sequence[tuple[str, str]]:
    """The WWW-Authenticate headers, one a scheme: browsers do not find Basic in a header that names several."""
    if fault.status != 401:
        return ()
    return (("www-authenticate", 'Basic realm="autosam3d: any name, and the token as password"'),
            ("www-authenticate", "Bearer"))


def _is_our_page(headers: Headers, method: str) -> bool:
    """Refuse forms and scripts of other sites, which browsers send with another Origin."""
    origin = headers.get("origin")
    if origin is not None:
        scheme, _, place = origin.partition("://")
        return scheme in ("http", "https") and place.lower() == headers.get("host", "").lower()
    return method in _SAFE or headers.get("sec-fetch-site", "none") in ("none", "same-origin")


def host_name(host: str) -> str | None:
    """The name or address in a Host header, in lower case, without port and brackets; None where it is neither.

    *Source*: RFC 9110 section 7.2, RFC 3986 section 3.2.2.
    """
    found = _HOST.fullmatch(host)
    if found is None:
        return None
    if found["six"] is None:
        return found["name"].lower()
    try:
        return str(ipaddress.IPv6Address(found["six"]))
    except ValueError:
        return None


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _is_static(scope: Scope) -> bool:
    path = scope["path"]
    return path == "/" or path.startswith(("/assets/", "/ort/", "/model/", "/icon", "/manifest", "/licenses"))


def _drop_many_ranges(scope: Scope) -> None:
    """Drop a Range header with many ranges, so that the whole file is the answer."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    scope["headers"] = [(name, value) for name, value in headers
                        if name != b"range" or value.count(b",") < _MAX_RANGES]


def request_id_of(request: Any) -> str:
    return request.scope.get("state", {}).get("request_id", "-")
