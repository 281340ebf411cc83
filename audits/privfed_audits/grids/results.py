"""A grid's state in one value: what the tables, the page and the recommendation are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from privfed_audits.grids.cells import Cell, distinct
from privfed_audits.grids.compare import Choice, Matched, choose, front, matched
from privfed_audits.grids.grid import Grid
from privfed_audits.grids.measures import Point, Setting, points, settings, utility_name
from privfed_audits.grids.store import Record

CONTRADICTED = "contradicted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that is known of a grid so far.

    Attributes:
        points: The finished cells.
        settings: The configurations over their seeds.
        front: Of them those that none dominates.
        choice: The one to take; None while nothing is finished.
        matched: Leakage at equal utility.
        utility: What utility is.
    """

    grid: Grid
    cells: tuple[Cell, ...]
    records: Mapping[str, Record]
    points: tuple[Point, ...]
    settings: tuple[Setting, ...]
    front: tuple[Setting, ...]
    choice: Choice | None
    matched: tuple[Matched, ...]
    utility: str

    @property
    def runs(self) -> int:
        """How many runs the grid has."""
        return len(distinct(self.cells))

    @property
    def finished(self) -> int:
        """How many of them are through, whatever came of them."""
        return len(distinct(self.cells).keys() & self.records.keys())

    def troubles(self) -> list[tuple[Cell, str, str]]:
        """Return (cell, what, why) of each cell that was refused, has failed, was not audited, or is contradicted."""
        found = []
        for cell in self.cells:
            record = self.records.get(cell.key, {})
            if cell.config is None:
                found.append((cell, "refused", cell.refusal))
            elif record.get("state") in ("refused", "failed"):
                found.append((cell, str(record["state"]), str(record["reason"])))
            elif "failed" in record.get("audit", {}):
                found.append((cell, "not audited", str(record["audit"]["failed"])))
            elif record.get("audit", {}).get("contradicted"):
                found.append((cell, CONTRADICTED, _broken(record["audit"])))
        return found

    def state(self, cell: Cell) -> str:
        """Return what became of a cell: done, refused, failed or waiting."""
        if cell.config is None:
            return "refused"
        return str(self.records.get(cell.key, {"state": "waiting"})["state"])


def _broken(audit: Mapping[str, Any]) -> str:
    from privfed_audits.auditing import contradiction  # loads torch, which showing a grid does not need

    return contradiction(audit) or ""


def results(grid: Grid, cells: Sequence[Cell], records: Mapping[str, Record]) -> Results:
    """Return what the finished cells say."""
    found = points(cells, records)
    by_setting = settings(found)
    utility = utility_name(found)
    return Results(
        grid=grid,
        cells=tuple(cells),
        records=records,
        points=found,
        settings=by_setting,
        front=front(by_setting),
        choice=choose(by_setting, utility),
        matched=matched(by_setting, grid.compared_with),
        utility=utility,
    )
