"""A deployment on one machine for the Flower benchmarks: its files, its processes, what they wrote, how big they are.

python benchmarks/flower_lab.py RUN    # where the time of a deployment's rounds went
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from privfed.config import RunConfig, load_config
from privfed.deployment.join import card_of
from privfed.deployment.processes import free_port
from privfed.deployment.site_config import SiteConfig
from privfed.privacy.ledger import Ledger

PRIVFED = [sys.executable, "-m", "privfed.cli"]
SERVER = "server"
Process = subprocess.Popen[bytes]
Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a deployment's parties are.

    Attributes:
        address: Where sites reach the server.
        within: Put before a party's command, by its name, such as what enters its network namespace.
    """

    address: str = "127.0.0.1"
    within: Mapping[str, Sequence[str]] = field(default_factory=dict)


class Lab:
    """The deployment's files and processes.

    Args:
        folder: Made anew.
        source: The run's TOML file or preset.
        settings: Overrides, ``key=value``. Noise is reproducible, so that sums can be checked.
        sites: How many; clients are dealt out to them in turn.
        place: Where they are.
    """

    def __init__(
        self, folder: Path, source: str, settings: Sequence[str], *, sites: int = 4, place: Place | None = None
    ) -> None:
        self.folder, self.port, self.place = folder.resolve(), free_port(), place or Place()
        shutil.rmtree(folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.config: RunConfig = load_config(source, ["privacy.reproducible_noise=true", *settings])
        (self.folder / "run.toml").write_text(self.config.to_toml(), encoding="utf-8")
        self.names = [f"site-{number}" for number in range(sites)]
        cards = [self._enrolled(name, number) for number, name in enumerate(self.names)]
        (self.folder / "roster.toml").write_text("\n".join(cards), encoding="utf-8")
        self.running: dict[str, Process] = {}
        self.peaks: dict[str, int] = {}

    def _enrolled(self, name: str, number: int) -> str:
        """Write a site's file and return its card."""
        given = {
            "name": name,
            "superlink": f"{self.place.address}:{self.port}",
            "roster": str(self.folder / "roster.toml"),
            "state": str(self.folder / name),
            "root_certificates": str(self.folder / SERVER / "tls" / "ca.pem"),
            "part": [number, len(self.names)],
        }
        accept = {"models": [self.config.model.name], "reproducible_noise": True}
        lines = [f"{key} = {json.dumps(value)}" for key, value in given.items()]
        lines += ["[accept]", *(f"{key} = {json.dumps(value)}" for key, value in accept.items())]
        (self.folder / f"{name}.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        site = SiteConfig.model_validate({**given, "accept": accept})
        return card_of(site, str(self.folder / "run.toml"), (), lambda line: print(line, flush=True))

    def serve(self, *options: str) -> Process:
        """Start the server."""
        given = ["--roster", "roster.toml", "-o", "run", "--state", SERVER, "--port", str(self.port)]
        if self.place.address != "127.0.0.1":
            given += ["--host", "0.0.0.0", "--name", self.place.address]
        return self._start(SERVER, "serve", "run.toml", *given, *options)

    def join(self, name: str) -> Process:
        """Start a site, once the authority's certificate is there."""
        self.wait(lambda: (self.folder / SERVER / "tls" / "server.pem").exists())
        return self._start(name, "join", f"{name}.toml")

    def _start(self, name: str, *arguments: str) -> Process:
        command = [*self.place.within.get(name, ()), *PRIVFED, *arguments]
        with (self.folder / f"{name}.log").open("ab") as out:
            self.running[name] = subprocess.Popen(command, cwd=self.folder, stdout=out, stderr=subprocess.STDOUT)
        return self.running[name]

    def whole(self, *options: str) -> None:
        """Run from start to end, and note how big each process grew."""
        server = self.serve(*options)
        for name in self.names:
            self.join(name)
        self.wait(lambda: server.poll() is not None, 3600.0)
        if server.returncode:
            raise RuntimeError(self.said(SERVER))

    def lines(self, path: str) -> list[Record]:
        """Return the whole lines of a file of JSON objects."""
        file = self.folder / path
        if not file.exists():
            return []
        text = file.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def rounds(self) -> list[Record]:
        """Return the run's rounds so far; one that was repeated counts as it came out in the end."""
        found = {(r["phase"], r["round"]): r for r in self.lines("run/metrics.jsonl") if r["kind"] == "round"}
        return list(found.values())

    def asked(self, name: str, kind: str) -> int:
        """Return how many messages of a kind a site has answered."""
        return sum(1 for line in self.lines(f"{name}/site.jsonl") if line["asked"] == kind)

    def said(self, name: str) -> str:
        """Return the end of what a party has said."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def wait(self, done: Callable[[], bool], seconds: float = 1800.0) -> None:
        """Wait for something to be so; meanwhile look at how much memory the processes have."""
        deadline, look = time.monotonic() + seconds, 0.0
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(self.said(SERVER))
            if time.monotonic() > look:
                self._note_memory()
                look = time.monotonic() + 2.0
            time.sleep(0.05)

    def _note_memory(self) -> None:
        for name, process in self.running.items():
            try:
                each = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                for one in each:
                    key = f"{name}: {_role(one)}"
                    self.peaks[key] = max(self.peaks.get(key, 0), one.memory_info().rss)
            except psutil.Error:  # it has ended meanwhile
                continue

    def close(self) -> None:
        """End what is still running."""
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()

    def ledgers(self) -> list[str]:
        """Return a line a site: whether its ledger is sound, how many charges it has, and how many of them twice."""
        told = []
        for name in self.names:
            with Ledger.open(self.folder / name / "ledger.sqlite") as ledger:
                keys = [(e.charge.client_id, e.charge.phase, e.charge.round) for e in ledger.entries()]
                sound, twice = not ledger.verify(), len(keys) - len(set(keys))
            told.append(f"{name}: ledger sound: {sound}, {len(keys)} charges, {twice} made twice")
        return told


def _role(process: psutil.Process) -> str:
    command = process.cmdline()
    found = next((Path(part).name for part in command if Path(part).name.startswith(("flower-", "flwr-"))), None)
    return found or ("privfed" if "privfed.cli" in command else process.name())


def times(run: Path) -> str:
    """Return a table of where the time of a deployment's rounds went, by phase: means over all but the first round."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds = [line for line in lines if line["kind"] == "round" and not line["lost"]]
    told = [
        "| phase | rounds | s a round | stage train | stage agree | stage unmask | of these: transport, polling "
        "| sites at work | training, all clients | masking, all clients | server alone |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for phase in dict.fromkeys(r["phase"] for r in rounds):
        found = [r["seconds"] for r in rounds if r["phase"] == phase]
        cells = _split(found[1:] or found)  # the first one opens the session, in two more stages
        told.append(f"| {phase} | {len(found)} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(told)


def _split(rounds: Sequence[Mapping[str, float]]) -> list[float]:
    def mean(*names: str) -> float:
        return sum(each.get(name, 0.0) for each in rounds for name in names) / len(rounds)

    stages = [mean(f"stage_{stage}") for stage in ("train", "agree", "unmask")]
    every = sum(mean(f"stage_{stage}") for stage in ("keys", "shares")) + sum(stages)
    busy = mean(*(f"busy_{stage}" for stage in ("keys", "shares", "train", "agree", "unmask")))
    total = mean("total")
    return [total, *stages, every - busy, busy, mean("train"), mean("mask"), total - every]


def settings_of(arguments: Sequence[str]) -> list[str]:
    """Return overrides given as ``-s key=value``."""
    return [argument for argument in arguments if argument != "-s"]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(times(Path(sys.argv[1])))
