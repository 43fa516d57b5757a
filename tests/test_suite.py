"""The tests themselves: they say the same however they are started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
CHILD = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"


def test_tests_and_what_they_start_hear_sigint() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert subprocess.check_output([sys.executable, "-c", CHILD], text=True) == "True\n"


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_so_they_do_when_started_in_the_background_of_a_script() -> None:
    """A shell without job control lets what it starts with ``&`` ignore SIGINT."""
    one = f"{__file__}::{test_tests_and_what_they_start_hear_sigint.__name__}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "AUTOSAM3D_TESTS"))}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "1", one], capture_output=True, text=True,
                          timeout=60, env=environment, cwd=REPO,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert done.returncode == 0, done.stdout
