"""The settings of ``autosam3d serve`` as a person writes them: docs/serve.yaml is the whole list with its defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from autosam3d.inference.device_names import is_device_name
from autosam3d.recipes.settings_file import Words
from autosam3d.recipes.typed_tree import demand
from autosam3d.services.serve.settings import ServeSettings, demand_token_off_loopback, read_token
from autosam3d.services.workers.messages import WorkerSettings
from autosam3d.user_folders import state_folder


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All that can be set. Relative paths are relative to the working folder."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    model: Path | None = None
    """Run folder, checkpoint's .json, packed model or export; None takes the model of the package."""
    sam: str | None = None
    """SAM weights, for a model that was trained on frozen ones and does not hold them: a file or a Hugging Face id."""
    backend: str = "auto"
    """As for ``autosam3d segment``."""
    device: str = "auto"
    threads: int = 0
    """CPU threads of a worker; 0 divides the cores of this process among the workers."""
    workers: int = 1
    """Scans at the same time, a process each."""
    max_ram_gib: float = 4.0
    """Memory that a worker may take."""
    scan_minutes: float = 60.0
    """A scan that takes longer is given up."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs `token_file`."""
    port: int = 8000
    """0 takes a free one."""
    token_file: Path | None = None
    """File with the token that clients must show; nobody else may be able to read it."""
    allow_host: Words = ()
    """Names that clients call the service by, beside its address."""
    app: bool = True
    """Give out the browser app, too."""
    folder: Path | None = None
    """The queue and all files; None takes the user's state folder."""
    queue: int = 32
    """Scans that may wait."""
    max_upload_mib: int = 2048
    """A scan as it is sent."""
    keep_hours: float = 24.0
    """Results are deleted after this."""

    def __post_init__(self) -> None:
        demand(is_device_name(self.device), "device", "auto, cpu, mps, cuda or cuda:N", self.device)
        demand(0 <= self.threads <= 1024, "threads", "0 to 1024", self.threads)
        demand(1 <= self.workers <= 64, "workers", "1 to 64", self.workers)
        demand(0.25 <= self.max_ram_gib <= 4096, "max_ram_gib", "0.25 to 4096", self.max_ram_gib)
        demand(0.1 <= self.scan_minutes <= 1440, "scan_minutes", "0.1 to 1440", self.scan_minutes)
        demand(0 <= self.port <= 65_535, "port", "0 to 65535", self.port)
        demand(1 <= self.queue <= 10_000, "queue", "1 to 10000", self.queue)
        demand(1 <= self.max_upload_mib <= 65_536, "max_upload_mib", "1 to 65536", self.max_upload_mib)
        demand(0.0003 <= self.keep_hours <= 8760, "keep_hours", "0.0003 to 8760", self.keep_hours)

    def service(self) -> ServeSettings:
        """What the service is told.

        Raises:
            As `read_token` and `demand_token_off_loopback`.
        """
        token = read_token(self.token_file) if self.token_file is not None else None
        demand_token_off_loopback(self.host, token)
        return ServeSettings(
            folder=(self.folder or state_folder() / "serve").absolute(), host=self.host, port=self.port, token=token,
            allow_hosts=self.allow_host, workers=self.workers, queue=self.queue,
            max_upload_bytes=self.max_upload_mib << 20, keep_seconds=3600 * self.keep_hours, app=self.app,
        )

    def worker(self, cores: int) -> WorkerSettings:
        """What each worker process is told.

        Args:
            cores: that this process may use.
        """
        return WorkerSettings(
            model=self.model.absolute() if self.model is not None else None, sam=self.sam, backend=self.backend,
            device=self.device, threads=self.threads or max(1, cores // self.workers),
            max_ram_bytes=int(self.max_ram_gib * 2**30), job_seconds=60 * self.scan_minutes,
        )
