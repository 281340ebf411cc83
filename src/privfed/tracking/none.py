"""No tracker: metrics.jsonl and the report have everything."""

from __future__ import annotations

from typing import Literal

from privfed.table import Table
from privfed.tracking import TRACKERS, TrackedRun, TrackerPlugin


class NoTrackerConfig(Table):
    """No options."""

    name: Literal["none"] = "none"


def start(config: NoTrackerConfig, run: TrackedRun) -> None:
    """Return no tracker."""


TRACKERS.register("none")(TrackerPlugin(config=NoTrackerConfig, build=start))
