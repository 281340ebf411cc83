"""Sends a run's figures to its tracker: whoever watches the run is told everything first, the tracker reads along.

A tracker sees what ``metrics.jsonl`` holds when a round is complete, and nothing else. One that fails is turned off:
the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privfed.federation.progress import Progress, Silent
from privfed.tracking import TRACKERS, TrackedRun, Tracker, check_tracker, public_values

if TYPE_CHECKING:
    from privfed.run_config import RunConfig

# where things lie on this machine is nobody else's business
_PATHS = ("data.path", "data.test_path", "ledger.path")


class Following(Progress):
    """Passes everything on, and reads the new lines of ``metrics.jsonl`` after each round.

    Args:
        inner: Who watches the run.
        config: The run.
        folder: Its folder; it may not be there yet.
    """

    def __init__(self, inner: Progress, config: RunConfig, folder: Path) -> None:
        self._inner, self._config, self._folder = inner, config, folder
        self._plugin = TRACKERS.get(_name(config))
        self._tracker: Tracker | None = None
        self._read = 0
        self._off = _name(config) == "none"

    def message(self, text: str) -> None:
        """Pass on."""
        self._inner.message(text)

    def round_started(self, phase: str, number: int, rounds: int, cohort: int) -> None:
        """Pass on."""
        self._inner.round_started(phase, number, rounds, cohort)

    def step_done(self, client_id: str, step: int, steps: int) -> None:
        """Pass on."""
        self._inner.step_done(client_id, step, steps)

    def client_done(self, client_id: str) -> None:
        """Pass on."""
        self._inner.client_done(client_id)

    def client_dropped(self, client_id: str, reason: str) -> None:
        """Pass on."""
        self._inner.client_dropped(client_id, reason)

    def round_done(self, phase: str, number: int, rounds: int, epsilon: float | None) -> None:
        """Pass on, then send the round."""
        self._inner.round_done(phase, number, rounds, epsilon)
        self.catch_up()

    def evaluated(self, phase: str, number: int, metric: str, value: float) -> None:
        """Pass on."""
        self._inner.evaluated(phase, number, metric, value)

    def catch_up(self) -> None:
        """Send the lines that are new."""
        if self._off:
            return
        lines = (self._folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        for line in lines[self._read :]:
            if line.endswith(b"\n"):
                self._read += 1
                self._send(json.loads(line))

    def close(self, *, finished: bool) -> None:
        """Send what is left; nothing where no round was completed."""
        if self._tracker is None or self._off:
            return
        if finished:
            self.catch_up()
        tracker = self._tracker
        self._guarded(lambda: tracker.close(finished=finished))

    def _send(self, line: dict[str, Any]) -> None:
        if self._off:
            return
        values, step = public_values(line, unit=self._config.privacy.unit)
        self._guarded(lambda: self._opened(values, step))

    def _opened(self, values: dict[str, float], step: int) -> None:
        """Send figures; the tracker is opened when there are the first, for the run folder is there then."""
        if self._tracker is None:
            facts = json.loads((self._folder / "run.json").read_text(encoding="utf-8"))
            run = TrackedRun(run_id=facts["run_id"], folder=self._folder, config=flat(self._config))
            self._tracker = self._plugin.build(self._config.tracking, run)
        if self._tracker is not None:
            self._tracker.log(values, step)

    def _guarded(self, send: Callable[[], None]) -> None:
        try:
            send()
        except self._plugin.failures() as error:
            self._off = True
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.message(
                f"Warning: the tracker {_name(self._config)!r} failed and is off from here on ({first:.200}); "
                "metrics.jsonl has everything."
            )


@contextmanager
def following(config: RunConfig, folder: Path, progress: Progress | None) -> Iterator[Progress]:
    """Yield a progress that also sends the run's figures to the tracker that the configuration names.

    Raises:
        ConfigError: If the tracker's package is not there.
    """
    check_tracker(_name(config))
    watch = Following(progress or Silent(), config, folder)
    finished = False
    try:
        yield watch
        finished = True
    finally:
        watch.close(finished=finished)


def flat(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as ``table.key``, without the paths of this machine."""

    def walk(tables: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tables.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return {key: value for key, value in walk(config.to_dict(), "") if key not in _PATHS}


def _name(config: RunConfig) -> str:
    return str(getattr(config.tracking, "name", "none"))
