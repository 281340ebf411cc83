"""Kill a run at random moments, resume it each time, and compare the end with that of an unbroken run.

    python benchmarks/kill_resume.py --kills 20 --config tiny

A real ``privfed train`` process is killed (SIGKILL) at moments spread over the whole of a run: start-up, training,
and the writing of the results. Every run so treated is resumed until it ends; then its adapter must be the unbroken
run's to the bit, its ledger must hold the same charges (but for times, the run's id and the hashes over them) and
be sound, and its metrics must be the same but for times. The noise is made reproducible, for bits are compared.

Prints one line a kill and a verdict; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# of the kills, this share falls before the run folder is there, and this after training
STARTUP_SHARE, FINISH_SHARE = 0.15, 0.2
OF_THE_RUN = {"time", "run_id", "previous_hash", "hash"}


@dataclass(frozen=True, kw_only=True)
class Landmarks:
    """When, in seconds from its start, an unbroken run reached what."""

    folder: float
    training: float
    trained: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill, and where it found the run."""

    number: int
    run: int
    moment: float
    found: str


class Trainer:
    """Starts ``privfed train`` processes of one configuration.

    Args:
        config: A TOML file or a preset.
        settings: ``key=value`` overrides.
        work: A folder for the runs.
    """

    def __init__(self, config: str, settings: Sequence[str], work: Path) -> None:
        self._config, self._work = config, work
        self._settings = [*settings, "privacy.reproducible_noise=true"]

    def folder(self, name: str) -> Path:
        """Return a run's folder."""
        return self._work / name

    def ledger(self, name: str) -> Path:
        """Return a run's own ledger."""
        return self._work / f"{name}.sqlite"

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a run, or resume it where there is one."""
        folder = self.folder(name)
        command = [sys.executable, "-m", "privfed.cli", "train", self._config, "-o", str(folder)]
        command += ["--ledger", str(self.ledger(name)), "--json"]
        command += [part for setting in self._settings for part in ("-s", setting)]
        if (folder / "config.toml").exists():
            command.append("--resume")
        # one thread: other numbers of threads may add in another order
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (self._work / f"{name}.out").open("wb") as out, (self._work / f"{name}.err").open("ab") as err:
            return subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)

    def check(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Raise unless a process that ended by itself ended well."""
        if process.returncode:
            said = (self._work / f"{name}.out").read_text() + (self._work / f"{name}.err").read_text()[-2000:]
            raise RuntimeError(f"privfed train ended with exit code {process.returncode}: {said}")

    def measure(self, name: str) -> Landmarks:
        """Run to the end undisturbed and return when it reached what."""
        folder, started = self.folder(name), time.monotonic()
        wanted = [folder / "config.toml", folder / "checkpoint", folder / "adapter.tmp"]
        reached: list[float] = []
        process = self.start(name)
        while process.poll() is None:
            here = len(reached) < len(wanted) and wanted[len(reached)].exists()
            late = len(reached) == 2 and (folder / "adapter").exists()  # the temporary one was too quick to be seen
            if here or late:
                reached.append(time.monotonic() - started)
            time.sleep(0.005)
        self.check(name, process)
        end = time.monotonic() - started
        reached += [end] * (3 - len(reached))
        return Landmarks(folder=reached[0], training=reached[1], trained=reached[2], end=end)


def moments(marks: Landmarks, count: int, rng: random.Random) -> list[float]:
    """Return ``count`` moments in random order: some in start-up, most in training, some in the finish.

    Within each part they are spread evenly, at random places of equal pieces.
    """
    early = max(1, round(STARTUP_SHARE * count)) if count > 1 else 0
    late = max(1, round(FINISH_SHARE * count)) if count > 2 else 0
    parts = [(early, 0.0, marks.training), (count - early - late, marks.training, marks.trained)]
    parts.append((late, marks.trained, marks.end))
    found = [
        low + (high - low) * (piece + rng.random()) / pieces for pieces, low, high in parts for piece in range(pieces)
    ]
    rng.shuffle(found)
    return found


def kill_and_resume(trainer: Trainer, when: Sequence[float], finished: list[str]) -> Iterator[Kill]:
    """Kill runs at these moments, resuming each until it ends; yield each kill.

    A moment that comes after the end of a resumed run is kept for the next fresh run; one that comes after the end
    of a fresh run falls a little earlier the next time.

    Args:
        trainer: Starts the processes.
        when: Seconds after the start of a process.
        finished: Gets the names of the runs that ended.
    """
    run, number, fresh = 1, 0, True
    ahead = list(when)
    while ahead:
        name = f"killed-{run}"
        process, moment = trainer.start(name), ahead[0]
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if process.returncode == -signal.SIGKILL:
            number, fresh = number + 1, False
            ahead.pop(0)
            yield Kill(number=number, run=run, moment=moment, found=found_at(trainer.folder(name)))
            continue
        trainer.check(name, process)
        finished.append(name)
        if fresh:
            ahead[0] *= 0.8
        run, fresh = run + 1, True
    if not fresh:
        name = f"killed-{run}"
        process = trainer.start(name)
        process.wait()
        trainer.check(name, process)
        finished.append(name)


def found_at(folder: Path) -> str:
    """Return in words how far a run had come, from what is on disk."""
    from privfed.federation.checkpoint import load_checkpoint

    if not (folder / "config.toml").exists():
        return "before the run folder"
    if (folder / "report.html").exists():
        return "after the report"
    if (folder / "receipt.json").exists():
        return "after the receipt"
    if (folder / "adapter").exists():
        return "after the adapter"
    checkpoint = load_checkpoint(folder / "checkpoint" / "state.safetensors")
    if checkpoint is None:
        return "before the first checkpoint"
    return f"after round {checkpoint.state.round} of {checkpoint.state.phase}"


def differences(trainer: Trainer, whole: str, broken: str) -> list[str]:
    """Return in sentences how the end of one run differs from that of another."""
    from privfed.privacy.ledger import Ledger

    found = []
    if _adapter(trainer.folder(whole)) != _adapter(trainer.folder(broken)):
        found.append("the adapters differ")
    rows = {}
    for name in (whole, broken):
        with Ledger.open(trainer.ledger(name), create=False) as ledger:
            found += [f"the ledger of {name}: {problem}" for problem in ledger.verify()]
            # the order of rows is compared as well
            rows[name] = [_row(entry.charge) for entry in ledger.entries()]
    if rows[whole] != rows[broken]:
        found.append(f"the ledgers differ: {len(rows[whole])} and {len(rows[broken])} charges")
    if _metrics(trainer.folder(whole)) != _metrics(trainer.folder(broken)):
        found.append("the metrics differ")
    if _receipt(trainer.folder(whole)) != _receipt(trainer.folder(broken)):
        found.append("the receipts differ")
    left = {path.name for path in trainer.folder(broken).iterdir()} ^ {p.name for p in trainer.folder(whole).iterdir()}
    # a kill within the writing of the report leaves its temporary file, which the next one has another name for
    left = {name for name in left if not name.endswith(".tmp")}
    if left:
        found.append(f"the folders differ in {', '.join(sorted(left))}")
    return found


def _adapter(folder: Path) -> dict[str, str]:
    """Return the hashes of the adapter's files, and of the clients' own where there are any."""
    files = [path for name in ("adapter", "clients") for path in sorted((folder / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _row(charge: Any) -> dict[str, Any]:
    return {name: getattr(charge, name) for name in charge.__dataclass_fields__ if name not in OF_THE_RUN}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("time", "seconds")} for line in lines]


def _receipt(folder: Path) -> dict[str, Any]:
    receipt = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
    # where the ledger is belongs to the configuration, and here every run has its own
    return {k: v for k, v in receipt.items() if k not in ("run_id", "created", "ledger_head", "config_digest")}


def main() -> int:
    """Run the comparison and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--config", default="tiny", help="a TOML file or a preset (default: %(default)s)")
    parser.add_argument("-s", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="privfed-kill-"))
    try:
        return compare(Trainer(options.config, options.settings, work), options.kills, options.seed)
    finally:
        shutil.rmtree(work)


def compare(trainer: Trainer, kills: int, seed: int) -> int:
    """Measure, kill, resume, compare and print; return the exit code."""
    marks = trainer.measure("whole")
    print(
        f"unbroken run: {marks.end:.2f} s (run folder at {marks.folder:.2f} s, training from {marks.training:.2f} s "
        f"to {marks.trained:.2f} s)",
        flush=True,
    )
    finished: list[str] = []
    for kill in kill_and_resume(trainer, moments(marks, kills, random.Random(seed)), finished):
        print(
            f"kill {kill.number:2d}/{kills} at {kill.moment:6.3f} s ({kill.moment / marks.end:4.0%}) of a process of "
            f"run {kill.run}: {kill.found}",
            flush=True,
        )
    wrong = [f"{name}: {problem}" for name in finished for problem in differences(trainer, "whole", name)]
    for line in wrong:
        print(line)
    end = "DIFFERENT" if wrong else "the same adapter to the bit, the same ledger, the same metrics as unbroken"
    print(f"{kills} kills in {len(finished)} runs, each resumed to its end: {end}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
