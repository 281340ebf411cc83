"""What an operator watches: lines on the terminal, one JSON object a stage, and Prometheus text.

Nothing here depends on data but what the run releases anyway: who took part, bytes, seconds, epsilon, the test score.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from privfed.federation.progress import Progress
from privfed.files import write_atomic

GAUGES = {
    "privfed_round": "Completed rounds of the phase.",
    "privfed_rounds": "Rounds of the phase.",
    "privfed_survivors": "Clients in the last round's sum.",
    "privfed_cohort": "Clients asked in the last round.",
    "privfed_bytes_up": "Bytes that clients sent in the last round.",
    "privfed_bytes_down": "Bytes that clients were sent in the last round.",
    "privfed_round_seconds": "Seconds that the last round took.",
    "privfed_epsilon_spent": "Epsilon spent so far, for the most exposed.",
    "privfed_epsilon_left": "Epsilon that the plan leaves.",
    "privfed_score": "The test score.",
}


class Watch(Progress):
    """Writes a run's progress to files that `privfed serve` and Prometheus read.

    Args:
        log: The file of lines.
        prometheus: The file of gauges (node_exporter's text file format); rewritten each round.
        metrics: The run's ``metrics.jsonl``, whose last round says what lines do not.
    """

    def __init__(self, log: Path, prometheus: Path, metrics: Path) -> None:
        self._log, self._prometheus, self._metrics = log, prometheus, metrics
        self._started = time.monotonic()
        self._gauges: dict[str, float] = {}

    def message(self, text: str) -> None:
        """Write one line."""
        with self._log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def client_dropped(self, client_id: str, reason: str) -> None:
        """Say who left and why."""
        self.message(f"dropped {client_id}: {reason}")

    def round_started(self, phase: str, number: int, rounds: int, cohort: int) -> None:  # noqa: ARG002
        """Note the cohort."""
        self._gauges |= {"privfed_cohort": cohort, "privfed_rounds": rounds}

    def evaluated(self, phase: str, number: int, metric: str, value: float) -> None:
        """Say the score."""
        self._gauges["privfed_score"] = value
        self.message(f"{phase} {number}: {metric} {value:.3f}")

    def round_done(self, phase: str, number: int, rounds: int, epsilon: float | None) -> None:
        """Say where the run stands."""
        last = _last(self._metrics, "round")
        planned = _last(self._metrics, "start").get("planned_epsilon")
        seconds = last.get("seconds", {})
        self._gauges |= {
            "privfed_round": number,
            "privfed_survivors": last.get("survivors", 0),
            "privfed_bytes_up": last.get("bytes_up", 0),
            "privfed_bytes_down": last.get("bytes_down", 0),
            "privfed_round_seconds": seconds.get("total", 0.0),
        }
        spent = "no privacy"
        if epsilon is not None:
            self._gauges["privfed_epsilon_spent"] = epsilon
            spent = f"epsilon {epsilon:.2f} spent"
            if isinstance(planned, float):
                left = max(0.0, planned - epsilon)
                self._gauges["privfed_epsilon_left"] = left
                spent += f", {left:.2f} left"
        self.message(
            f"{phase} {number}/{rounds}: {last.get('survivors', 0)} of {last.get('cohort', 0)} clients, "
            f"{last.get('bytes_up', 0) / 1e3:,.0f} kB up, {last.get('bytes_down', 0) / 1e3:,.0f} kB down, {spent}, "
            f"{seconds.get('total', 0.0):.1f} s ({time.monotonic() - self._started:.0f} s in all)"
        )
        self._write(phase)

    def _write(self, phase: str) -> None:
        lines = []
        for name, value in self._gauges.items():
            lines += [f"# HELP {name} {GAUGES[name]}", f"# TYPE {name} gauge", f'{name}{{phase="{phase}"}} {value:g}']
        write_atomic(self._prometheus, ("\n".join(lines) + "\n").encode())


class JsonLog:
    """One JSON object a line, with the time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now, **record}) + "\n")


def _last(path: Path, kind: str) -> dict[str, Any]:
    """Return the last line of a kind; empty where there is none."""
    if not path.exists():
        return {}
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        found: dict[str, Any] = json.loads(line)
        if found.get("kind") == kind:
            return found
    return {}
