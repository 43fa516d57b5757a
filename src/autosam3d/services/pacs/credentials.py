"""The credentials for an archive: from a file that others cannot read, or from the environment."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from autosam3d.errors import UsageError
from autosam3d.io.files import decoded, read_private
from autosam3d.services.addresses import is_loopback

VARIABLE = "AUTOSAM3D_PACS_AUTH"
_MAX_BYTES = 16384


@dataclass(frozen=True)
class Credentials:
    """The value of the header Authorization; `repr` does not show it."""

    header: str = field(repr=False)


def read_credentials(path: Path | None, environment: Mapping[str, str] = os.environ) -> Credentials | None:
    """Read credentials from the file, else from the variable AUTOSAM3D_PACS_AUTH, else return None.

    Either holds one line: ``USER:PASSWORD``, or ``Bearer TOKEN``.

    Raises:
        UsageError: AUTH_FILE: others may read it, or it holds something else. Its content is never repeated.
        VolumeError: NOT_A_FILE, UNREADABLE.
    """
    if path is None:
        text = environment.get(VARIABLE, "")
        return _parsed(text, VARIABLE) if text else None
    content = read_private(path, _MAX_BYTES + 1, "AUTH_FILE")
    try:
        return _parsed(decoded(content), path)
    except UnicodeDecodeError:
        raise _unknown(path) from None


def demand_safe_transport(url: str, credentials: Credentials | None, insecure: bool) -> None:
    """Refuse a URL that is wrong or shows credentials, and to send credentials where the network can read them.

    Raises:
        UsageError: INSECURE, URL.
    """
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise UsageError("URL", "--dicomweb", "expected http(s)://HOST[:PORT]/PATH", "name the root of the DICOMweb "
                         "service, such as https://archive.example/dicom-web")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UsageError("URL", "--dicomweb", "expected no name, password or query in the URL, where others see them",
                         f"use --auth-file or {VARIABLE}")
    if credentials is not None and parts.scheme == "http" and not is_loopback(host) and not insecure:
        raise UsageError("INSECURE", "--dicomweb", "credentials would go over plain http to another machine",
                         "use https, or allow it with --set insecure=true")


def _parsed(text: str, where: str | Path) -> Credentials:
    line = text.strip()
    if not line or not line.isprintable() or len(line) > _MAX_BYTES:
        raise _unknown(where)
    if line.lower().startswith("bearer "):
        token = line[7:].strip()
        if token and " " not in token and token.isascii():
            return Credentials(f"Bearer {token}")
    elif ":" in line and not line.startswith(":"):
        return Credentials("Basic " + base64.b64encode(line.encode()).decode())
    raise _unknown(where)


def _unknown(where: str | Path) -> UsageError:
    return UsageError("AUTH_FILE", where, "expected one line, USER:PASSWORD or Bearer TOKEN", "write it so")
