"""Progress on stderr: live bars at a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn

from privfed.federation.progress import Progress

PHASES = {"warm_start": "head warm start", "train": "training"}


def _spent(epsilon: float | None) -> str:
    return "no privacy" if epsilon is None else f"epsilon spent {epsilon:.2f}"


class Lines(Progress):
    """One plain line a round."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._score = ""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_exc: object) -> None:
        return None

    def message(self, text: str) -> None:
        """Say one line."""
        print(text, file=sys.stderr, flush=True)

    def client_dropped(self, client_id: str, reason: str) -> None:
        """Say who left and why."""
        self.message(f"dropped {client_id}: {reason}")

    def round_done(self, phase: str, number: int, rounds: int, epsilon: float | None) -> None:
        """Say where the run stands."""
        elapsed = time.monotonic() - self._started
        self.message(f"{PHASES.get(phase, phase)} {number}/{rounds}  {_spent(epsilon)}{self._score}  {elapsed:.0f} s")
        self._score = ""

    def evaluated(self, phase: str, number: int, metric: str, value: float) -> None:
        """Remember the score for the round's line."""
        if number == 0:
            self.message(f"{PHASES.get(phase, phase)}: {metric} before the first round {value:.3f}")
        else:
            self._score = f"  {metric} {value:.3f}"


class Bars(Progress):
    """Live bars for rounds, the round's clients and the client's steps."""

    def __init__(self) -> None:
        self._bars = rich_progress.Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}
        self._score = ""

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def message(self, text: str) -> None:
        """Say one line above the bars."""
        self._bars.console.print(text, highlight=False, markup=False)

    def round_started(self, phase: str, number: int, rounds: int, cohort: int) -> None:
        """Show the round and start the clients' bar over."""
        name = PHASES.get(phase, phase)
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=rounds, completed=number - 1, note="")
        self._reset("clients", cohort)

    def step_done(self, client_id: str, step: int, steps: int) -> None:
        """Advance the client's bar."""
        if step == 1 or "steps" not in self._tasks:
            self._reset("steps", steps)
        self._bars.update(self._tasks["steps"], completed=step, note=client_id)

    def client_done(self, client_id: str) -> None:
        """Advance the clients' bar."""
        self._bars.advance(self._tasks["clients"])

    def client_dropped(self, client_id: str, reason: str) -> None:
        """Say who left and why."""
        self.message(f"dropped {client_id}: {reason}")

    def round_done(self, phase: str, number: int, rounds: int, epsilon: float | None) -> None:
        """Advance the rounds' bar and show the budget."""
        note = f"{_spent(epsilon)}{self._score}"
        self._bars.update(self._tasks[PHASES.get(phase, phase)], completed=number, note=note)

    def evaluated(self, phase: str, number: int, metric: str, value: float) -> None:
        """Show the score beside the rounds."""
        self._score = f"  {metric} {value:.3f}"

    def _reset(self, name: str, total: int) -> None:
        if name in self._tasks:
            self._bars.reset(self._tasks[name], total=total, note="")
        else:
            self._tasks[name] = self._bars.add_task(name, total=total, note="")


def make_progress() -> Bars | Lines:
    """Return bars where stderr is a terminal, lines elsewhere."""
    return Bars() if sys.stderr.isatty() else Lines()
