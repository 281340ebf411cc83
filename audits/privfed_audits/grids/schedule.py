"""Run cells in worker processes: as many as there are cores and memory for, and no cell lost with its worker."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from privfed_audits.grids.store import Record, Store
from privfed_audits.grids.work import worker

# what a worker is taken to need until one has told: torch, a small model, its cached states
FIRST_GUESS = 1.5 * 2**30
# of the most that a worker has needed, what must be free before another starts
MARGIN = 1.25
# threads of numerical libraries: one, so that neither the results nor the machine depend on how many there are
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(slots=True, kw_only=True)
class Worker:
    """A process and the cell that it is at."""

    process: Any
    connection: Connection
    key: str | None = None


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a grid is, for whoever watches.

    Attributes:
        total: Runs of the grid.
        done: Of them finished, in this process or before.
        seconds: Wall time of each that finished in this process.
        workers: How many run.
        started: When this process began.
    """

    total: int
    done: int
    seconds: list[float] = field(default_factory=list)
    workers: int = 1
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float | None:
        """Return the seconds that are about left, or None before a cell has told."""
        if not self.seconds or self.total == self.done:
            return None if not self.seconds else 0.0
        # the first cells make what the others share, so the latest tell more
        return (self.total - self.done) * statistics.fmean(self.seconds[-8:]) / max(1, self.workers)

    def line(self) -> str:
        """Return it in words."""
        left = self.left()
        about = "" if left is None else f", about {duration(left)} left"
        return f"{self.done} of {self.total} runs, {duration(time.monotonic() - self.started)}{about}"


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def run_all(
    tasks: Mapping[str, str],
    store: Store,
    *,
    jobs: int | None,
    audit: bool,
    attacks: Sequence[str],
    finished: Callable[[str, str, float], None],
    progress: Progress,
) -> None:
    """Run every task and keep what it gave.

    Args:
        tasks: The configuration of each run, as TOML, by its key, in the order to run them.
        store: Where results are kept; workers write there themselves.
        jobs: At most so many at once; None for as many as there are cores.
        audit: Whether runs are audited.
        attacks: With which attacks; empty for the audit's own choice.
        finished: Told the key, the state and the seconds of each run that is through.
        progress: Kept up to date.
    """
    scheduler = _Scheduler(deque(tasks.items()), store, jobs or os.cpu_count() or 1, (audit, tuple(attacks)))
    try:
        while scheduler.busy():
            scheduler.fill()
            progress.workers = len(scheduler.workers)
            for key, state, seconds in scheduler.collect():
                progress.done += 1
                if state == "done":  # what is refused takes no time
                    progress.seconds.append(seconds)
                finished(key, state, seconds)
    finally:
        scheduler.stop()


class _Scheduler:
    """Workers, what they are at, and what is still to be given out."""

    def __init__(
        self, tasks: deque[tuple[str, str]], store: Store, jobs: int, options: tuple[bool, tuple[str, ...]]
    ) -> None:
        self.workers: list[Worker] = []
        self._tasks = tasks
        self._store = store
        self._jobs = jobs
        self._options = options
        self._peak = FIRST_GUESS
        self._context = multiprocessing.get_context("spawn")

    def busy(self) -> bool:
        """Return whether anything is still to be run."""
        return bool(self._tasks) or any(each.key is not None for each in self.workers)

    def fill(self) -> None:
        """Give every idle worker a cell; start another where there are cells, cores and memory for it."""
        while self._tasks:
            idle = next((each for each in self.workers if each.key is None), None)
            if idle is None and not self._room():
                return
            self._give(idle or self._start())

    def collect(self) -> Iterable[tuple[str, str, float]]:
        """Wait for a message or the end of a worker; return (key, state, seconds) of cells that are through."""
        ready = wait([each.connection for each in self.workers], timeout=5.0)
        found = []
        for each in [w for w in self.workers if w.connection in ready]:
            try:
                key, state, seconds, peak = each.connection.recv()
            except (EOFError, OSError):
                found += self._lost(each)
                continue
            each.key = None
            self._peak = max(self._peak if self._peak != FIRST_GUESS else 0, float(peak))
            found.append((key, state, seconds))
        return found

    def stop(self) -> None:
        """End the workers; one that is at a cell is not waited for."""
        for each in self.workers:
            if each.key is None:
                each.connection.send(None)
            else:
                each.process.kill()
        for each in self.workers:
            each.process.join()
            each.connection.close()
        self.workers.clear()

    def _room(self) -> bool:
        if len(self.workers) >= self._jobs:
            return False
        return not self.workers or psutil.virtual_memory().available > MARGIN * self._peak

    def _start(self) -> Worker:
        before = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
        try:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=worker, args=(theirs, str(self._store.path), *self._options))
            process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()  # so that the end of the worker is the end of the connection
        found = Worker(process=process, connection=ours)
        self.workers.append(found)
        return found

    def _give(self, to: Worker) -> None:
        to.key, raw = self._tasks.popleft()
        try:
            to.connection.send((to.key, raw))
        except OSError:
            self._tasks.appendleft((to.key, raw))  # it ended while idle: another takes the cell
            to.key = None
            self.workers.remove(to)

    def _lost(self, each: Worker) -> list[tuple[str, str, float]]:
        """Take a worker that ended from the list; its cell has failed."""
        self.workers.remove(each)
        each.process.join()
        if each.key is None:
            return []
        code = each.process.exitcode
        cause = f"was ended by signal {-code} (9 is what a machine without memory sends)" if code < 0 else "ended"
        record: Record = {
            "state": "failed",
            "reason": f"The worker {cause} during this cell: lower -j.",
            "cpu_seconds": 0.0,
        }
        self._store.keep(each.key, record)
        return [(each.key, "failed", 0.0)]


__all__ = ["Progress", "duration", "run_all"]
