"""`privfed curves` as its user meets it: a grid that really trains, killed and resumed, to the same table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from privfed.cli import main
from privfed_audits.grids.schedule import Progress, duration

# a grid starts processes that import torch: on a machine that is busy with other things this takes its time
PATIENCE = 500.0
AUDITED = ["audit.record=true", "audit.canaries=32"]


def start(grid: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "privfed.cli", "curves", str(grid), "-o", str(out), "-j", "2", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(out: Path) -> int:
    return len(list((out / "cells").glob("*.json")))


def wait_for(condition: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition() and running.poll() is None:
        assert time.monotonic() < end, "the grid does not get on"
        time.sleep(0.05)


ADAM = ["privacy.unit=none", "privacy.target_epsilon=unset", "client.optimizer=adamw", "client.learning_rate=0.01"]


def children(pid: int) -> list[int]:
    """Return the worker processes of a grid."""
    listed = subprocess.run(
        ["ps", "-wwo", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "spawn_main" in line]


@pytest.mark.slow
def test_killed_three_times_and_resumed_the_same_table(small_grid: Callable[..., Path], tmp_path: Path) -> None:
    grid = small_grid(audit=True, settings=AUDITED, attacks=["loss", "gradient_dot"])
    whole = start(grid, tmp_path / "whole", "--recommend", "epsilon<=9, bytes<=1MB")
    output, errors = whole.communicate(timeout=PATIENCE)
    assert whole.returncode == 0, errors
    assert "Cells:      4 of 8 done, 4 refused, 0 failed." in output
    assert "1. " in output and "Written:" in output
    assert "4 of 4 runs" in errors and "left" in errors

    out = tmp_path / "killed"
    for kill in range(3):
        running = start(grid, out, *(["--resume"] if kill else []))
        # at the start of a cell, then in the middle of one, then with cells finished
        wait_for(lambda: (out / "work").exists() and any((out / "work").iterdir()), running)
        if kill == 1:
            time.sleep(0.5)
        if kill == 2:
            wait_for(lambda: finished(out) >= 2, running)
        workers = children(running.pid)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        wait_for_the_end(workers)
    resumed = start(grid, out, "--resume")
    output, errors = resumed.communicate(timeout=PATIENCE)
    assert resumed.returncode == 0, errors
    assert "Cells:      4 of 8 done, 4 refused, 0 failed." in output
    assert f"{finished(out)} different runs" in errors and "0 finished before" not in errors
    for table in sorted((tmp_path / "whole" / "tables").iterdir()):
        assert (out / "tables" / table.name).read_bytes() == table.read_bytes(), table.name
    page = (tmp_path / "whole" / "curves.html").read_bytes()
    assert (out / "curves.html").read_bytes() == page
    assert not (out / "work").exists() and not (out / "shared").exists()


def wait_for_the_end(workers: list[int]) -> None:
    """A killed grid's workers end by themselves, so that nobody writes into its folder any more."""
    end = time.monotonic() + 60
    for pid in workers:
        while time.monotonic() < end:
            try:
                os.kill(pid, 0)
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                break
            if state == "Z":  # ended, and its new parent has not looked yet
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"worker {pid} outlived its grid")


@pytest.mark.slow
def test_a_worker_that_is_killed_fails_its_cell_alone_and_a_resume_runs_it(
    small_grid: Callable[..., Path], tmp_path: Path
) -> None:
    # long enough that no worker is done before it is killed
    grid, out = small_grid(privacy={"none": [*ADAM, "server.rounds=60"]}), tmp_path / "grid"
    running = start(grid, out)
    wait_for(lambda: (out / "work").exists() and any((out / "work").iterdir()), running)
    workers: list[int] = []
    wait_for(lambda: bool(workers.extend(children(running.pid)) or workers), running)
    os.kill(workers[0], signal.SIGKILL)
    output, errors = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0, errors
    assert "Cells:      1 of 4 done, 2 refused, 1 failed." in output
    assert "was ended by signal 9" in errors
    assert "was ended by signal 9" in (out / "curves.html").read_text()
    output, errors = start(grid, out, "--resume").communicate(timeout=PATIENCE)
    assert "Cells:      2 of 4 done, 2 refused, 0 failed." in output, errors


def test_usage_errors_are_one_sentence(small_grid: Callable[..., Path], tmp_path: Path) -> None:
    grid = str(small_grid())
    for arguments, code, sentence in (
        ([grid, "--recommend", "epsilon<4MB"], 2, "is no unit of epsilon"),
        ([grid, "--resume"], 2, "no grid to resume"),
        (["quik"], 2, "Did you mean 'quick'"),
        ([grid, "-j", "0"], 2, "x>=1"),
    ):
        result = CliRunner().invoke(main, ["curves", *arguments, "-o", str(tmp_path / "out"), "--json"])
        assert result.exit_code == code, result.output
        assert sentence in json.loads(result.stdout)["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_the_time_left_is_what_the_latest_runs_took() -> None:
    progress = Progress(total=10, done=0)
    assert progress.left() is None and "left" not in progress.line()
    progress.done, progress.seconds, progress.workers = 4, [500.0, *([20.0] * 8)], 2
    assert progress.left() == pytest.approx(60.0)
    assert progress.line().startswith("4 of 10 runs") and progress.line().endswith("about 1 min 00 s left")
    progress.done = 10
    assert progress.left() == 0.0
    assert [duration(s) for s in (3.4, 75, 3700, 8000)] == ["3 s", "1 min 15 s", "1 h 01 min", "2 h 13 min"]
