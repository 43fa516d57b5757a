"""The settings of ``autosam3d pacs`` and ``pacs listen`` as a person writes them: docs/pacs_watch.yaml and
docs/pacs_listen.yaml are the whole lists with their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ConfigDict

from autosam3d.errors import UsageError
from autosam3d.recipes.settings_file import Words
from autosam3d.recipes.typed_tree import demand
from autosam3d.services.pacs.rule import Rule, read_rule


@dataclass(frozen=True, kw_only=True)
class PacsConfig:
    """What both ways have in common. Relative paths are relative to the working folder."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    state: Path | None = None
    """Folder for the ledger and for scans at work; one process at a time. Must be given."""
    model: Path | None = None
    """Run folder, checkpoint's .json, packed model or export; None takes the model of the package."""
    rule: Rule = field(default_factory=Rule)
    """Which series are segmented."""
    rule_file: Path | None = None
    """YAML file with the keys of `rule`, instead of them."""
    every: bool = False
    """All series of the rule's modality; else the rule must ask for more than a modality."""
    settle_seconds: float = 60.0
    """What has not grown for so long is taken for whole."""
    tries: int = 10
    """Failures of a series until it is given up."""
    dicomweb: str | None = None
    """Root of the archive's DICOMweb service."""
    auth_file: Path | None = None
    """One line, USER:PASSWORD or Bearer TOKEN; None takes the variable AUTOSAM3D_PACS_AUTH, if there is one."""
    ca_file: Path | None = None
    """Certificates of the authorities to believe."""
    insecure: bool = False
    """Take any certificate, and send credentials over plain http."""
    overlap: float | None = None
    """Of windows; None takes the model's."""
    max_ram_gib: float | None = None
    """Memory that the worker may take; None sets no limit."""
    threads: int = 0
    """CPU threads; 0 takes the cores of this process."""

    def __post_init__(self) -> None:
        demand(0 <= self.settle_seconds <= 86_400, "settle_seconds", "0 to 86400", self.settle_seconds)
        demand(1 <= self.tries <= 1000, "tries", "1 to 1000", self.tries)
        demand(self.overlap is None or 0 <= self.overlap <= 0.9, "overlap", "0 to 0.9", self.overlap)
        fits = self.max_ram_gib is None or 0.25 <= self.max_ram_gib <= 4096
        demand(fits, "max_ram_gib", "0.25 to 4096", self.max_ram_gib)
        demand(0 <= self.threads <= 1024, "threads", "0 to 1024", self.threads)

    def chosen_rule(self) -> Rule:
        """The rule, from its file where one is named.

        Raises:
            UsageError: USAGE, there is none, or more than one. As `read_rule`.
        """
        if self.rule_file is not None:
            if self.rule != Rule() or self.every:
                raise UsageError("USAGE", "--rule", "expected a rule or single options, got both",
                                 "put all into the file")
            return read_rule(self.rule_file)
        if not (self.rule.narrows or self.every):
            raise UsageError("USAGE", "pacs", "expected a rule, since no model is made for every CT",
                             "add --rule FILE, --body-part or --description, or --every")
        return self.rule


@dataclass(frozen=True, kw_only=True)
class WatchConfig(PacsConfig):
    """Looking at an archive."""

    poll_seconds: float = 60.0
    """Between two looks."""
    days: int | None = None
    """Look at studies of the last N days alone; None looks at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        demand(1 <= self.poll_seconds <= 86_400, "poll_seconds", "1 to 86400", self.poll_seconds)
        demand(self.days is None or 0 <= self.days <= 36_500, "days", "0 to 36500", self.days)


@dataclass(frozen=True, kw_only=True)
class ListenConfig(PacsConfig):
    """Being sent to."""

    tries: int = 30
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs `allow_ae`."""
    port: int = 11_112
    """0 takes a free one."""
    ae_title: str = "AUTOSAM3D"
    """Ours; senders must call it."""
    send_to: str | None = None
    """AE@HOST:PORT of the archive that takes the results by C-STORE; or `dicomweb`, which takes them by STOW-RS."""
    allow_ae: Words = ()
    """AE titles of senders that are answered."""
    allow_from: Words = ()
    """Addresses or networks, such as 10.1.0.0/16, that are answered."""
    keep_hours: float = 1.0
    """Images are kept for so long for slices that come late."""
    keep_failed_days: float = 7.0
    """Images of a series that was given up are kept for so long."""

    def __post_init__(self) -> None:
        super().__post_init__()
        demand(0 <= self.port <= 65_535, "port", "0 to 65535", self.port)
        demand(0 <= self.keep_hours <= 720, "keep_hours", "0 to 720", self.keep_hours)
        demand(0 <= self.keep_failed_days <= 3650, "keep_failed_days", "0 to 3650", self.keep_failed_days)
