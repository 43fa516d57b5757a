"""Options that became keys of settings: what to write instead, for who types the old one."""

from __future__ import annotations

_SERVE = {"--sam": "sam", "--max-ram": "max_ram_gib", "--queue": "queue", "--max-upload": "max_upload_mib",
          "--scan-minutes": "scan_minutes", "--app": "app", "--no-app": "app"}
_PACS = {"--modality": "rule.modality", "--settle": "settle_seconds", "--tries": "tries", "--ca-file": "ca_file",
         "--insecure": "insecure", "--overlap": "overlap", "--max-ram": "max_ram_gib", "--threads": "threads"}

_TUNE = {"--scope": "tune.scope", "--jitter": "tune.jitter_px", "--lr": "tune.lr", "--batch-size": "tune.batch_size",
         "--epochs": "tune.epochs", "--minutes": "tune.minutes", "--seed": "tune.seed", "--min-px": "tune.min_slice_px",
         "--min-vox": "tune.min_case_vox", "--val-cases": "tune.val_cases", "--validate-every": "tune.validate_every"}
_SLICES = {"--points": "prompts.num_points", "--jitter": "prompts.jitter_px", "--seed": "prompts.seed",
           "--case": "cases", "--prefer": "reading.prefer", "--assume-ras": "reading.assume_ras",
           "--force": "reading.force"}
_NNUNET = {"--configuration": "configuration", "--fold": "fold", "--epochs": "epochs", "--iterations": "iterations",
           "--patch": "patch", "--batch": "batch", "--tta": "tta", "--no-tta": "tta"}
_STUDY = {"--more": "study.more", "--student": "study.student", "--medsam": "study.medsam",
          "--photographs": "study.photographs", "--by-case": "study.by_case"}

MOVED: dict[str, tuple[dict[str, str], str]] = {
    "serve": (_SERVE, "docs/serve.yaml"),
    "pacs": (_PACS | {"--poll": "poll_seconds", "--days": "days"}, "docs/pacs_watch.yaml"),
    "pacs listen": (_PACS | {"--ae-title": "ae_title", "--allow-from": "allow_from", "--every": "every",
                             "--keep": "keep_hours", "--keep-failed": "keep_failed_days", "--auth-file": "auth_file"},
                    "docs/pacs_listen.yaml"),
    "slicewise tune": (_TUNE, "autosam3d slicewise tune --help"),
    "slicewise segment": (_SLICES, "autosam3d slicewise segment --help"),
    "nnunet": (_NNUNET, "autosam3d nnunet --help"),
    "reproduce": (_STUDY, "autosam3d reproduce --help"),
}
"""Command to its options that are keys now, and what lists the keys."""


def remedy_for(command: str, option: str) -> str | None:
    """What to write instead of an option that a command does not have; None where it never had it.

    Args:
        command: behind ``autosam3d``, such as ``pacs listen``.
    """
    keys, page = MOVED.get(command, ({}, ""))
    if option not in keys:
        return None
    value = "false" if option.startswith("--no-") else "VALUE"
    return f"write --set {keys[option]}={value}, see {page}"
