"""Break every part of a real deployment once, and say what it cost.

    python benchmarks/flower_faults.py [FOLDER] [RUN.TOML|PRESET] [privfed overrides, such as -s server.rounds=8]

Four sites of one client each on loopback, with TLS and node authentication. A site is killed (SIGKILL) while it trains
and after each stage of a round, and started again; one is stopped for longer than a stage may take, as a cut network
would have it; one trains for longer than ``client.deadline_s``. Then the ServerApp is killed, and the SuperLink, each
followed by `privfed serve --resume`. Whether every sum was right is found out by a run in one process in which the same
clients are absent from the same rounds: noise is reproducible here, so it has to end in the same bits. Each ledger is
verified and searched for charges that were made twice.
"""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flower_lab import SERVER, Lab, Process, Record, settings_of, times

from privfed.config import RunConfig
from privfed.federation import material as materials
from privfed.federation.checkpoint import load_checkpoint
from privfed.federation.exchange import Connect, Exchange
from privfed.run import train

STAGE_SECONDS, DEADLINE_SECONDS = 60.0, 40.0  # well above what a stage takes on a busy machine
OWN = [
    "server.rounds=60",
    "server.cohort_size=4",
    "server.evaluate_every=60",
    "head_warm_start.name=none",
    "partition.clients=4",
    "data.limit=200",
    f"client.deadline_s={DEADLINE_SECONDS}",
]


@dataclass(slots=True, kw_only=True)
class Replay(Exchange):
    """A round in one process from which some clients are absent."""

    absent: Mapping[tuple[str, int], Collection[str]]

    def _serve_all(self, link: Any, cohort: Sequence[str], ask: Callable[..., Any]) -> None:
        away = self.absent[self.phase.plan.name, self.round]
        Exchange._serve_all(self, link, [client for client in cohort if client not in away], ask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """An engine of one process that repeats which clients were absent when."""

    rounds: Sequence[Record]

    def material(self, config: RunConfig) -> materials.Material:
        """Return the run's data."""
        return materials.gather(config)

    def start(self, config: RunConfig, *_: object) -> Connect:
        """Return what makes the rounds."""
        everyone = {f"client-{number}" for number in range(int(getattr(config.partition, "clients", 0)))}
        absent = {
            (r["phase"], r["round"]): everyone if r["lost"] else {each["client_id"] for each in r["dropped"]}
            for r in self.rounds
        }
        return partial(Replay, absent=absent)

    def finish(self) -> None:
        """There is nobody to tell."""


def same_sums(lab: Lab) -> bool:
    """Return whether a run in one process with the same clients absent ends in the same bits."""
    train(lab.config, out=lab.folder / "replayed", engine=Again(rounds=lab.rounds()))
    one, two = (load_checkpoint(lab.folder / run / "checkpoint" / "state.safetensors") for run in ("run", "replayed"))
    return one is not None and two is not None and np.array_equal(one.state.params_D, two.state.params_D)


def _trainings(lab: Lab, name: str) -> int:
    """Return how many trainings a site has begun."""
    with closing(sqlite3.connect(f"file:{lab.folder / name / 'memory.sqlite'}?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT COUNT(*) FROM rounds").fetchone()[0])


def _after(lab: Lab, name: str, stage: str) -> None:
    """Wait until a site has answered a stage, or has begun to train."""
    if stage == "training":
        begun = _trainings(lab, name)
        lab.wait(lambda: _trainings(lab, name) > begun)
    else:
        before = lab.asked(name, stage)
        lab.wait(lambda: lab.asked(name, stage) > before)


def _whole_again(lab: Lab, done: int) -> str:
    """Wait for a round with all clients in it, and say what the rounds since were."""
    seen: set[int] = set()

    def back() -> bool:
        since = lab.rounds()[done:]
        seen.update(r["round"] for r in since if r["lost"] or r["survivors"] < len(lab.names))
        return bool(since and seen) and not since[-1]["lost"] and since[-1]["survivors"] == len(lab.names)

    lab.wait(back)
    return _told(lab.rounds()[done:])


def _told(rounds: Sequence[Record]) -> str:
    """Return what became of rounds, one part for those in a row that went alike."""
    parts = []
    for what, alike in itertools.groupby(rounds, _outcome):
        numbers = [each["round"] for each in alike]
        which = f"round {numbers[0]}" if len(numbers) == 1 else f"rounds {numbers[0]}-{numbers[-1]}"
        parts.append(f"{which}: {what}")
    return ", ".join(parts)


def _outcome(each: Record) -> str:
    if each["lost"]:
        return "lost"
    why = "; ".join(f"{d['client_id']}: {d['reason'].split(':')[0]}" for d in each["dropped"])
    return f"{each['survivors']} of {each['cohort']}{f' ({why})' if why else ''}"


def _kill_site(lab: Lab, name: str, stage: str) -> str:
    done = len(lab.rounds())
    _after(lab, name, stage)
    lab.running[name].kill()
    lab.running[name].wait()
    lab.join(name)
    return _whole_again(lab, done)


def _tree(process: Process) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def _stop_site(lab: Lab, name: str, seconds: float, *, node: bool) -> str:
    """Stop a site while it trains, with its SuperNode or without, and let it go on."""
    done = len(lab.rounds())
    _after(lab, name, "training")
    stopped = _tree(lab.running[name])[: None if node else 1]
    for process in stopped:
        process.suspend()
    time.sleep(seconds)
    for process in stopped:
        process.resume()
    return _whole_again(lab, done)


def _kill_server(lab: Lab, which: str) -> str:
    """Kill the ServerApp or the SuperLink in the middle of a round, resume, and say what came of it."""
    server, done = lab.running[SERVER], len(lab.rounds())
    _after(lab, lab.names[0], "agree")
    if which == "ServerApp":
        os.kill(int((lab.folder / SERVER / "serverapp.pid").read_text()), signal.SIGKILL)
    else:
        next(each for each in _tree(server) if any("flower-superlink" in part for part in each.cmdline())).kill()
    code = server.wait()
    lab.serve("--resume", "--stage-seconds", f"{STAGE_SECONDS:g}")
    lab.wait(lambda: len(lab.rounds()) > done + 1)
    return f"serve ended with exit code {code}; resumed, {_told(lab.rounds()[done : done + 2])}"


def faults(lab: Lab) -> list[tuple[str, Callable[[], str]]]:
    """Return what is done to a deployment, in order."""
    a, b, c, d = lab.names
    return [
        (f"{a} killed while it trains", lambda: _kill_site(lab, a, "training")),
        (f"{b} killed after it answered `train`", lambda: _kill_site(lab, b, "train")),
        (f"{c} killed after it answered `agree`", lambda: _kill_site(lab, c, "agree")),
        (f"{d} killed after it answered `unmask`", lambda: _kill_site(lab, d, "unmask")),
        (
            f"{a} and its SuperNode stopped for {STAGE_SECONDS + DEADLINE_SECONDS + 15:g} s, then let go",
            lambda: _stop_site(lab, a, STAGE_SECONDS + DEADLINE_SECONDS + 15, node=True),
        ),
        (
            f"{b} trains {DEADLINE_SECONDS + 5:g} s, its deadline is {DEADLINE_SECONDS:g} s",
            lambda: _stop_site(lab, b, DEADLINE_SECONDS + 5, node=False),
        ),
        ("the ServerApp killed within a round", lambda: _kill_server(lab, "ServerApp")),
        ("the SuperLink killed within a round", lambda: _kill_server(lab, "SuperLink")),
    ]


def main() -> None:
    """Run it and print the table."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/flower-faults")
    source = sys.argv[2] if len(sys.argv) > 2 else "tiny"
    lab = Lab(folder, source, [*OWN, *settings_of(sys.argv[3:])])
    rows = []
    try:
        lab.serve("--stage-seconds", f"{STAGE_SECONDS:g}")
        for name in lab.names:
            lab.join(name)
        lab.wait(lambda: len(lab.rounds()) >= 1)
        for what, do in faults(lab):
            started = time.monotonic()
            rows.append(f"| {what} | {do()} | {time.monotonic() - started:.0f} s |")
            print(rows[-1], flush=True)
        lab.wait(lambda: lab.running[SERVER].poll() is not None)
    finally:
        lab.close()
    print("\n| what was done | rounds until all took part again | took |\n|---|---|---|")
    print("\n".join(rows))
    print("\n".join(lab.ledgers()))
    print(f"rounds: {len(lab.rounds())}, receipt written: {(lab.folder / 'run' / 'receipt.json').exists()}")
    print(f"every sum as in one process with the same clients absent (same bits): {same_sums(lab)}")
    print(times(lab.folder / "run"))


if __name__ == "__main__":
    main()
