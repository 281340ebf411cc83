"""No tracker: metrics.jsonl and the report have everything."""

from __future__ import annotations

from typing import Literal

from privfed.table import Table
from privfed.tracking import TRACKERS, TrackerPlugin


class NoTrackerConfig(Table):
    """No options."""

    name: Literal["none"] = "none"


TRACKERS.register("none")(TrackerPlugin(config=NoTrackerConfig))
