"""How a service runs, and the clock that it trusts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from autosam3d.errors import UsageError
from autosam3d.io.files import read_private
from autosam3d.services.addresses import is_loopback

_MIN_TOKEN, _MAX_TOKEN = 16, 512


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """All that the service is told at its start."""

    folder: Path
    """Jobs, their files and the queue; one service a folder, readable by its owner alone."""
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    """What every request must show; demanded where `host` is not this machine's own loopback."""
    allow_hosts: tuple[str, ...] = ()
    """Names, beside loopback's and the address itself, that browsers may call the service by."""
    workers: int = 1
    queue: int = 32
    """Scans that may wait; one more is answered 429."""
    max_upload_bytes: int = 2 << 30
    max_receiving: int = 64
    """Uploads that are taken in at the same time; one more is answered 503."""
    keep_seconds: float = 24 * 3600.0
    """Results are deleted this long after they were made."""
    drain_seconds: float = 30.0
    """Scans at work may take this long to finish when the service is stopped."""
    chunk_seconds: float = 10.0
    """A sender that is silent for longer is let go."""
    min_rate: float = 4096.0
    """Bytes a second; a sender that is slower over `rate_seconds` is let go."""
    rate_seconds: float = 20.0
    upload_seconds: float = 1800.0
    header_seconds: float = 20.0
    max_connections: int = 1000
    """Fewer where the process may open few files."""
    max_peer_connections: int = 256
    """From one address; one more takes the place of the one that has been silent for longest."""
    app: bool = True
    """Give out the browser app, too."""


@dataclass(frozen=True)
class SteadyClock:
    """Seconds since 1970 as they were at the start, going on steadily: setting the machine's clock deletes nothing."""

    wall: float = field(default_factory=time.time)
    since: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        return self.wall + time.monotonic() - self.since


def read_token(path: Path) -> str:
    """The one line of a token file.

    Raises:
        UsageError: TOKEN_FILE, others may read the file, or it holds no token.
        VolumeError: UNREADABLE, as for every file.
    """
    remedy = "write it with: (umask 077; python -c 'import secrets; print(secrets.token_urlsafe(32))' > FILE)"
    content = read_private(path, _MAX_TOKEN + 2, "TOKEN_FILE")
    try:
        token = content.decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if not _MIN_TOKEN <= len(token) <= _MAX_TOKEN or not all(33 <= ord(c) <= 126 and c != ":" for c in token):
        raise UsageError("TOKEN_FILE", path, f"expected {_MIN_TOKEN} to {_MAX_TOKEN} letters, digits and signs without "
                         "spaces and colons", remedy)
    return token


def demand_token_off_loopback(host: str, token: str | None) -> None:
    """Refuse to serve patients' scans to a whole network without asking who is there.

    Raises:
        UsageError: NO_TOKEN.
    """
    if token is None and not is_loopback(host):
        raise UsageError("NO_TOKEN", f"--host {host}", "expected --token-file: other machines can reach this address",
                         "give a token file, or serve on 127.0.0.1")
