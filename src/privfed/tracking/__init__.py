"""Trackers: a run's figures, as ``metrics.jsonl`` has them, for programs that draw them; one file a tracker.

What is sent is chosen here, for all trackers alike: figures that the report shows of the whole run. What
``metrics.jsonl`` has of single clients, or computed from clients' data without noise, stays there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from privfed.errors import ConfigError
from privfed.registry import Registry
from privfed.table import Table

SCORES = ("accuracy", "macro_f1", "matthews", "perplexity", "token_accuracy", "loss")
"""Scores of the whole model on all test rows."""

PUBLIC: dict[str, tuple[str, ...]] = {
    "start": (),
    "eval": SCORES,
    "round": ("epsilon", "survivors", "cohort", "bytes_up", "bytes_down"),
    "finish": (),
}
"""By kind of line, the values that a tracker is sent; no other kind of line is read."""

OF_THE_COHORT = frozenset({"survivors", "cohort", "bytes_up", "bytes_down"})
"""Values that tell how many clients were drawn, which is secret where the draw protects whole clients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        run_id: Unique for the run; the same after a resume.
        folder: The run folder.
        config: The configuration as ``table.key``, without the paths of this machine.
    """

    run_id: str
    folder: Path
    config: Mapping[str, Any] = field(repr=False)


class Tracker(Protocol):
    """Where a run's figures go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send figures of one step; those of a step may come again, with the same values, after a resume."""

    def close(self, *, finished: bool) -> None:
        """Send what is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerPlugin:
    """A tracker and what it needs.

    Attributes:
        config: Its table.
        build: Opens it for a run; may return None, for no tracker.
        package: The package that has to be there, and the extra of privfed that brings it.
        failures: Returns the exceptions by which the tracker fails; the run then goes on without it.
    """

    config: type[Table]
    build: Callable[[Any, TrackedRun], Tracker | None]
    package: str | None = None
    failures: Callable[[], tuple[type[Exception], ...]] = lambda: (OSError,)


TRACKERS: Registry[TrackerPlugin] = Registry("tracker", "privfed.tracking")
"""The trackers by ``tracking.name``."""


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is not there.

    Raises:
        ConfigError: If it is not.
    """
    package = TRACKERS.get(name).package
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f'tracking.name = "{name}" needs the package {package}, which is not installed: run '
            f"`pip install 'privfed[{name}]'`, or set tracking.name = \"none\"."
        )


def public_values(line: Mapping[str, Any], *, unit: str) -> tuple[dict[str, float], int]:
    """Return what of a line of ``metrics.jsonl`` a tracker is sent, by name, and its step.

    Args:
        line: The line.
        unit: ``privacy.unit``: where whole clients are protected, how many took part in a round is left out.
    """
    keys = PUBLIC.get(line["kind"], ())
    hidden = OF_THE_COHORT if unit == "client" else frozenset()
    phase = line.get("phase", "train")
    found = {f"{phase}/{key}": line.get(key) for key in keys if key not in hidden}
    return {key: float(value) for key, value in found.items() if value is not None}, int(line.get("round", 0))
