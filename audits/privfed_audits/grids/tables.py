"""The table behind each plot, as CSV. Nothing in them depends on when or how fast a cell ran."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from privfed.files import write_atomic
from privfed.types import VIEWS
from privfed_audits.grids.cells import place_of
from privfed_audits.grids.grid import AXES
from privfed_audits.grids.measures import Leak, Point, Setting
from privfed_audits.grids.results import Results
from privfed_audits.statistics import Estimate

Value = str | float | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A named table: the same columns in every row."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]

    def csv(self) -> str:
        """Return it as CSV; numbers with nine digits, an empty field for what there is none of."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([[_shown(value) for value in row] for row in self.rows])
        return buffer.getvalue()


def tables(found: Results) -> dict[str, Table]:
    """Return every table by its name."""
    made = (
        _table("cells", _cells(found)),
        _table("utility", _utility(found)),
        _table("leakage", _leakage(found)),
        _table("roc", _roc(found)),
        _table("front", _front(found)),
        _table("matched", _matched(found)),
        _table("reconstruction", _reconstruction(found)),
    )
    return {each.name: each for each in made}


def write_tables(found: Mapping[str, Table], folder: Path) -> None:
    """Write each table as a file of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in found.items():
        write_atomic(folder / f"{name}.csv", table.csv().encode())


def _table(name: str, rows: Iterator[dict[str, Value]]) -> Table:
    found = list(rows)
    columns = tuple(dict.fromkeys(key for row in found for key in row))
    return Table(name=name, columns=columns, rows=tuple(tuple(row.get(key) for key in columns) for row in found))


def _shown(value: Value) -> str:
    if value is None or value != value:  # NaN
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _place(each: Setting) -> dict[str, Value]:
    return dict(zip(AXES, each.labels, strict=True))


def _estimate(name: str, value: Estimate | None) -> dict[str, Value]:
    if value is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    if value.over == "nothing":
        return {name: value.mean, f"{name}_low": None, f"{name}_high": None}
    return {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}


def _cells(found: Results) -> Iterator[dict[str, Value]]:
    done = {(point.cell.labels, point.cell.seed): point for point in found.points}
    for cell in found.cells:
        record = found.records.get(cell.key, {})
        point = done.get((cell.labels, cell.seed))
        row: dict[str, Value] = {**place_of(cell), "state": found.state(cell), "key": cell.key}
        yield row | _figures(found, point) | {"reason": cell.refusal or record.get("reason")}


def _figures(found: Results, point: Point | None) -> dict[str, Value]:
    score = None if point is None else point.utility
    row: dict[str, Value] = {
        found.utility: -score if score is not None and found.utility == "perplexity" else score,
        "epsilon": None if point is None else point.epsilon,
        "bytes_run": None if point is None else point.bytes_run,
        "bytes_round": None if point is None else point.bytes_round,
    }
    for view in VIEWS:
        leak = None if point is None else point.leaks.get(view)
        row[f"empirical_epsilon_{view}"] = None if leak is None else leak.empirical
        row[f"auc_{view}"] = None if leak is None else leak.auc
    return row


def _utility(found: Results) -> Iterator[dict[str, Value]]:
    for each in found.settings:
        scores = {"epsilon": each.epsilon, **_score(found.utility, each.utility)}
        yield {**_place(each), **scores, "seeds": each.utility.n, "interval_over": each.utility.over}


def _score(name: str, value: Estimate) -> dict[str, Value]:
    if name != "perplexity":
        return _estimate(name, value)
    turned = Estimate(mean=-value.mean, low=-value.high, high=-value.low, n=value.n, over=value.over)
    return _estimate(name, turned)


def _leakage(found: Results) -> Iterator[dict[str, Value]]:
    for each in found.settings:
        for view in VIEWS:
            leaks = [leak for point in each.points if (leak := point.leak(view)) is not None]
            if (estimates := each.in_view(view)) is not None:
                row: dict[str, Value] = {**_place(each), "view": view, **_claim(leaks)}
                yield row | _estimate("empirical_epsilon", estimates[0]) | _estimate("auc", estimates[1])


def _claim(leaks: Sequence[Leak]) -> dict[str, Value]:
    first = leaks[0]
    ceilings = [leak.ceiling for leak in leaks if leak.ceiling is not None]
    return {
        "accounted_epsilon": first.accounted,
        "ceiling": sum(ceilings) / len(ceilings) if ceilings else None,
        "attack": first.attack,
        "bound": first.bound,
        "canaries": first.canaries,
        "seeds": len(leaks),
        "tpr_fpr": None if first.tpr is None else first.tpr[0],
        "tpr": None if first.tpr is None else sum(leak.tpr[1] for leak in leaks if leak.tpr) / len(leaks),
    }


def _roc(found: Results) -> Iterator[dict[str, Value]]:
    for point in found.points:
        for view in point.leaks:
            roc = point.record["audit"]["views"][view]["roc"]
            limits = roc["allowed"] or [None] * len(roc["fpr"])
            place: dict[str, Value] = {**place_of(point.cell), "view": view}
            for fpr, tpr, low, high, most in zip(roc["fpr"], roc["tpr"], roc["low"], roc["high"], limits, strict=True):
                yield {**place, "fpr": fpr, "tpr": tpr, "tpr_low": low, "tpr_high": high, "tpr_allowed": most}


def _front(found: Results) -> Iterator[dict[str, Value]]:
    taken = found.choice.setting if found.choice else None
    for each in found.settings:
        row: dict[str, Value] = {**_place(each), "epsilon": each.epsilon, **_score(found.utility, each.utility)}
        row |= _estimate("empirical_epsilon", each.leakage) | _estimate("auc", each.auc)
        yield row | {
            "bytes_run": each.bytes_run,
            "bytes_round": each.bytes_round,
            "on_front": int(each in found.front),
            "chosen": int(each is taken),
        }


def _matched(found: Results) -> Iterator[dict[str, Value]]:
    for row in found.matched:
        level = -row.utility if found.utility == "perplexity" else row.utility
        place: dict[str, Value] = {"tuning": row.tuning, "codec": row.codec, "secagg": row.secagg}
        figures = _estimate("auc_as_set", row.fixed) | _estimate("auc_matched", row.matched)
        gap = _estimate("difference", row.gap)
        yield {
            **place,
            f"{found.utility}_level": level,
            **figures,
            **gap,
            "p_holm": row.p_value,
            "seeds": row.matched.n,
        }


def _reconstruction(found: Results) -> Iterator[dict[str, Value]]:
    for point in found.points:
        for view, each in point.record.get("audit", {}).get("reconstruction", {}).items():
            yield {
                **place_of(point.cell),
                "view": view,
                "attack": each["attack"],
                "token_recall": each["token_recall"],
                "prior_token_recall": each["prior_token_recall"],
                "rouge_l": each["rouge_l"],
            }


__all__ = ["Table", "tables", "write_tables"]
