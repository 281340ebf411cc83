"""A run that is killed within a round ends like an unbroken one: the same bits, the same charges."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from privfed.privacy.mechanisms import MECHANISMS

SCRIPT = Path(__file__).with_name("killed_run.py")


def run(folder: Path, name: str, *die: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, SCRIPT, folder, name, *die], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", MECHANISMS.names())
def test_a_run_killed_within_a_round_ends_like_an_unbroken_one(name: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", name)
    assert whole.returncode == 0, whole.stderr
    broken = tmp_path / "broken"
    for number, moment in (("1", "after the charge"), ("3", "before the charge"), ("6", "after the release")):
        assert run(broken, name, number, moment).returncode == -signal.SIGKILL
    end = run(broken, name)
    assert end.returncode == 0, end.stderr
    assert json.loads(end.stdout) == json.loads(whole.stdout)
    assert json.loads(end.stdout)["entries"] == 6
