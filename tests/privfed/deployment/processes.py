"""A real deployment on loopback: `privfed serve` and `privfed join` as processes, TLS, node authentication."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from privfed.config import RunConfig
from privfed.deployment.processes import free_port

PRIVFED = [sys.executable, "-m", "privfed.cli"]


class Deployment:
    """Files and processes of one deployment.

    Args:
        config: The run.
        folder: All files go below it.
        count: Sites.
    """

    def __init__(self, config: RunConfig, folder: Path, count: int) -> None:
        self.folder, self.port = folder, free_port()
        folder.mkdir()
        (folder / "run.toml").write_text(config.to_toml())
        self.names = [f"site-{number}" for number in range(count)]
        self._running: list[subprocess.Popen[bytes]] = []
        for number, name in enumerate(self.names):
            (folder / f"{name}.toml").write_text(self._site(config, name, number, count))
            subprocess.run([*PRIVFED, "join", f"{name}.toml", "--card", "run.toml"], cwd=folder, check=True)
        cards = [(folder / f"{name}.card.toml").read_text() for name in self.names]
        (folder / "roster.toml").write_text("\n".join(cards))

    def _site(self, config: RunConfig, name: str, number: int, count: int) -> str:
        return f"""
name = "{name}"
superlink = "127.0.0.1:{self.port}"
roster = "roster.toml"
state = "{name}"
root_certificates = "server/tls/ca.pem"
part = [{number}, {count}]
[caps]
epsilon = 20.0
delta = 1e-4
[accept]
models = ["{config.model.name}"]
reproducible_noise = true
"""

    def serve(self, *options: str) -> subprocess.Popen[bytes]:
        """Start the server."""
        given = ["--roster", "roster.toml", "-o", "run", "--state", "server", "--port", str(self.port)]
        return self._start("serve.log", "serve", "run.toml", *given, *options)

    def join(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """Start a site, where it connects by itself once the authority's certificate is there."""
        if not options:
            self.wait(lambda: (self.folder / "server" / "tls" / "server.pem").exists())
        return self._start(f"{name}.log", "join", f"{name}.toml", *options)

    def said(self, log: str = "serve.log") -> str:
        """Return what a process has said so far."""
        path = self.folder / log
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, done: Callable[[], bool], seconds: float = 400.0) -> None:
        """Wait for something to be so."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(self.said()[-2000:])
            time.sleep(0.1)

    def _start(self, log: str, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (self.folder / log).open("ab") as out:
            process = subprocess.Popen(
                [*PRIVFED, *arguments], cwd=self.folder, stdout=out, stderr=subprocess.STDOUT, env=environment
            )
        self._running.append(process)
        return process

    def close(self) -> None:
        """End whatever is still running."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self._running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
