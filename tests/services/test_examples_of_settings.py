"""The examples of settings in the documents list every key with the default that it has."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from autosam3d.cli.moved import MOVED
from autosam3d.errors import AutoSam3dError, RecipeError, UsageError
from autosam3d.recipes.settings_file import read_settings
from autosam3d.recipes.yaml_text import parse_yaml
from autosam3d.services.pacs.config import ListenConfig, WatchConfig
from autosam3d.services.pacs.rule import Rule
from autosam3d.services.serve.config import ServeConfig
from command_line import run
from exports import mini_export

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLES = (("serve.yaml", ServeConfig), ("pacs_watch.yaml", WatchConfig), ("pacs_listen.yaml", ListenConfig))


def keys_of(kind: type) -> set[str]:
    keys = set()
    for field in fields(kind):
        default = field.default_factory() if field.default_factory is not MISSING else None
        inner = {f"{field.name}.{key}" for key in keys_of(type(default))} if is_dataclass(default) else {field.name}
        keys |= inner
    return keys


def keys_in(tree: dict[str, Any], above: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in tree.items():
        keys |= keys_in(value, f"{above}{key}.") if isinstance(value, dict) else {above + key}
    return keys


@pytest.mark.parametrize(("name", "kind"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_has_every_key_with_its_default(name: str, kind: type) -> None:
    text = (DOCS / name).read_text("utf-8")
    assert keys_in(parse_yaml(text, name)) == keys_of(kind)
    assert read_settings(kind, DOCS / name, guide=name) == kind()
    for line in text.splitlines():  # each key is explained
        if line and not line.startswith("#") and line != "rule:" and not line.startswith("  m"):
            assert "#" in line, line


def test_options_that_are_keys_now_say_which(tmp_path: Path) -> None:
    kinds = {"serve": ServeConfig, "pacs": WatchConfig, "pacs listen": ListenConfig}
    for command, kind in kinds.items():
        keys, page = MOVED[command]
        assert (DOCS.parent / page).is_file() and set(keys.values()) <= keys_of(kind)
    line = run("serve", "--max-upload", 5).demand_error("USAGE", 2)
    assert line.endswith("write --set max_upload_mib=VALUE, see docs/serve.yaml")
    line = run("pacs", "listen", "--keep", 5).demand_error("USAGE", 2)
    assert line.endswith("write --set keep_hours=VALUE, see docs/pacs_listen.yaml")
    assert run("serve", "--wrong").demand_error("USAGE", 2).endswith("see autosam3d --help")


def test_settings_become_what_the_service_is_told(tmp_path: Path) -> None:
    settings = read_settings(ServeConfig, None, (
        "max_upload_mib=3", "keep_hours=2", "scan_minutes=5", "max_ram_gib=1.5", "workers=2", "app=false",
        f"folder={tmp_path}", "allow_host=ct.example"), guide="docs/serve.yaml")
    service, worker = settings.service(), settings.worker(cores=6)
    assert (service.max_upload_bytes, service.keep_seconds, service.app) == (3 << 20, 7200, False)
    assert service.folder == tmp_path and service.allow_hosts == ("ct.example",) and service.token is None
    assert (worker.threads, worker.job_seconds, worker.max_ram_bytes) == (3, 300, 3 << 29)
    with pytest.raises(UsageError) as caught:
        ServeConfig(host="10.0.0.1").service()
    assert caught.value.code == "NO_TOKEN"


def test_a_pacs_needs_one_rule(tmp_path: Path) -> None:
    rule = tmp_path / "rule.yaml"
    rule.write_text("modality: CT\nmin_slices: 20\n")
    assert WatchConfig(rule_file=rule).chosen_rule() == Rule(min_slices=20)
    assert WatchConfig(rule=Rule(body_part=("HEAD",))).chosen_rule() == Rule(body_part=("HEAD",))
    assert ListenConfig(every=True, rule=Rule(modality=("CT", "PT"))).chosen_rule().modality == ("CT", "PT")
    for refused in (WatchConfig(), ListenConfig(rule=Rule(modality=("PT",))), WatchConfig(rule_file=rule, every=True),
                    WatchConfig(rule_file=rule, rule=Rule(min_slices=9))):
        with pytest.raises(UsageError):
            refused.chosen_rule()
    rule.write_text("min_slices: 0\n")
    with pytest.raises(RecipeError, match=r"rule.yaml: min_slices: expected 1 or more, got 0"):
        WatchConfig(rule_file=rule).chosen_rule()


def test_the_commands_read_their_files(tmp_path: Path) -> None:
    """Each refuses something that only its settings file says, before anything is begun."""
    config = tmp_path / "c.yaml"
    config.write_text("host: 10.0.0.1\n")
    run("serve", "--config", config).demand_error("NO_TOKEN", 2)
    run("serve", "--config", config, "--set", "port=70000").demand_error("BAD_VALUE", 2)
    config.write_text(f"state: {tmp_path}/s\ndicomweb: http://archive.example/d?a=b\nevery: true\n")
    run("pacs", "--config", config).demand_error("URL", 2)
    config.write_text(f"state: {tmp_path}/s\nsend_to: X@127.0.0.1:1\nevery: true\nhost: 0.0.0.0\n")
    run("pacs", "listen", "--config", config).demand_error("NO_CALLERS", 2)
    assert not (tmp_path / "s").exists()
    for kind in (WatchConfig, ListenConfig):
        with pytest.raises(AutoSam3dError):
            read_settings(kind, None, ("auth=jane:s3cret",), guide="docs")


def test_both_ways_beside_an_archive_start_from_their_settings(tmp_path: Path) -> None:
    model = mini_export()
    config = tmp_path / "c.yaml"
    config.write_text(f"state: {tmp_path}/listen\nsend_to: X@127.0.0.1:1\nmodel: {model}\nport: 0\n"
                      "rule: {min_slices: 9}\n")
    with subprocess.Popen([sys.executable, "-m", "autosam3d", "pacs", "listen", "--config", config, "--set",
                           "ae_title=OURS"], stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None and listener.stdout.readline().startswith("OURS listens on 127.0.0.1 port ")
        listener.send_signal(signal.SIGTERM)
        assert listener.wait(60) == 143
    config.write_text(f"state: {tmp_path}/watch\nmodel: {model}\nevery: true\n")
    done = run("pacs", "--config", config, "--dicomweb", "http://127.0.0.1:9/d", "--once")
    assert done.code != 0 and "SERVER_DOWN" in done.err and (tmp_path / "watch").is_dir()
