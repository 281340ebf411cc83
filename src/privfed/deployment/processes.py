"""Flower's processes: started with their logs in files, watched, and stopped by their own ids."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from privfed.errors import ConfigError, PrivfedError

STOP_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_EXTRA = "Flower is not installed: pip install 'privfed[flower]'."


@dataclass(slots=True)
class Process:
    """One of Flower's commands, running."""

    name: str
    command: list[str]
    log: Path
    popen: subprocess.Popen[bytes] = field(repr=False)

    @property
    def running(self) -> bool:
        """Whether it is still there."""
        return self.popen.poll() is None

    def stop(self) -> None:
        """Ask the process and what it started to end; end it after ten seconds."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            if not self.running:
                return
            os.killpg(self.popen.pid, how)
            try:
                self.popen.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue

    def tail(self, lines: int = 8) -> str:
        """Return the end of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def _die_with_parent() -> None:
    """Have Linux end this process with its parent, however that ends: a node left over would take messages."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def flower(name: str) -> str:
    """Return the path of one of Flower's commands, beside this Python.

    Raises:
        ConfigError: If Flower is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ConfigError(_EXTRA)
    return str(path)


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: its files under ``home``, nothing sent home."""
    given = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return {**os.environ, **given}


def start(name: str, command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> Process:
    """Start a command in a process group of its own, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        popen = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    return Process(name, list(command), log, popen)


def run(command: Sequence[str], *, env: Mapping[str, str], seconds: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run one of Flower's commands to its end and return what it said.

    Raises:
        PrivfedError: If it does not end in time.
    """
    try:
        return subprocess.run(
            list(command),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PrivfedError(
            f"{shown(command)} did not end within {seconds:g} s: see whether the SuperLink is up."
        ) from error


def shown(command: Sequence[str]) -> str:
    """Return a command as one would type it."""
    first, *rest = command
    return "$ " + shlex.join([Path(first).name, *rest])


def wait_for_port(host: str, port: int, process: Process, seconds: float = 300.0) -> None:
    """Wait until a process listens.

    Raises:
        PrivfedError: If it ends, or does not in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.running:
            raise PrivfedError(f"{process.name} ended as soon as it was started: {process.tail()}")
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.2)
    raise PrivfedError(
        f"{process.name} does not listen at {host}:{port} after {seconds:g} s; its log is {process.log}."
    )


def alive(pid: int) -> bool:
    """Return whether a process is there and has not ended: Flower leaves it unread how those it starts end."""
    try:
        return bool(psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    """Return a port of the loopback that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
