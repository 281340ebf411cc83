"""Write the page and the figures of a grid."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from privfed.files import write_atomic
from privfed.types import VIEWS
from privfed_audits.gallery_page import beside_style, environment
from privfed_audits.grids.grid import AXES
from privfed_audits.grids.page.plots import Plot, plots
from privfed_audits.grids.page.style import VIEW_NAMES, Style, style_of
from privfed_audits.grids.results import Results
from privfed_audits.grids.tables import Table, Value

MOST_EXAMPLES = 12
# of the many thousand rows behind the ROC only the file has all
MOST_ROWS = 400
AXIS_NAMES = {"tuning": "Tuning", "codec": "Codec", "privacy": "Privacy", "secagg": "Sum", "view": "Attacker sees"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """One group of boxes: (label, colour or none, symbol or none) of each."""

    axis: str
    title: str
    choices: tuple[tuple[str, str, str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One text that an attack found."""

    place: Mapping[str, str]
    name: str
    truth: str
    found: str
    prior: str
    score: float


def write_page(found: Results, made: Mapping[str, Table], path: Path) -> None:
    """Write the page: one file that loads nothing.

    Args:
        found: The grid so far.
        made: Its tables.
        path: The file.
    """
    write_atomic(path, render(found, made).encode("utf-8", errors="replace"))


def render(found: Results, made: Mapping[str, Table]) -> str:
    """Return the page as HTML; equal results give equal bytes."""
    import plotly.offline

    style = style_of(found)
    shown = plots(found, style)
    folder = files("privfed_audits.grids.page") / "templates"
    templates = environment({"curves.html.j2": (folder / "curves.html.j2").read_text(encoding="utf-8")})
    report = (files("privfed.report") / "templates" / "report.css").read_text(encoding="utf-8")
    # the style, the script and plotly are ours or shipped; figures are JSON without markup; the rest is escaped
    return templates.get_template("curves.html.j2").render(
        style=Markup(report + beside_style() + (folder / "curves.css").read_text(encoding="utf-8")),
        script=Markup((folder / "curves.js").read_text(encoding="utf-8")),
        plotly=Markup(plotly.offline.get_plotlyjs()),
        figures=Markup(_figures(shown)),
        found=found,
        plots={plot.name: plot for plot in shown},
        order=[plot.name for plot in shown],
        tables=made,
        table_rows=_table_rows,
        links={name: _link(table) for name, table in made.items()},
        filters=_filters(found, style),
        settings=_roc_settings(found),
        troubles=found.troubles(),
        examples=_examples(found),
        simulated=any(record.get("simulated") for record in found.records.values()),
        cell_text=_text,
    )


def write_figures(found: Results, folder: Path) -> None:
    """Write the figures as PNG and SVG, for a paper."""
    from privfed_audits.grids.page.paper import draw

    if found.points:
        draw(found, style_of(found), folder)


def _figures(shown: Sequence[Plot]) -> str:
    values = {plot.name: plot.figure.to_plotly_json() for plot in shown}
    for value in values.values():
        value["layout"].pop("template", None)  # the page has a style of its own, light and dark
    from plotly.utils import PlotlyJSONEncoder

    text = json.dumps(values, cls=PlotlyJSONEncoder, sort_keys=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _link(table: Table) -> str:
    return "data:text/csv;base64," + base64.b64encode(table.csv().encode()).decode()


def _filters(found: Results, style: Style) -> list[Filter]:
    """Return the groups of boxes: of each axis on which there is something to choose."""
    made = []
    for axis in AXES:
        labels = found.grid.labels(axis)
        if len(labels) > 1:
            marks = {"tuning": style.colours, "codec": {k: v[2] for k, v in style.symbols.items()}}.get(axis, {})
            colours = marks if axis == "tuning" else {}
            symbols = marks if axis == "codec" else {}
            choices = tuple((label, label, colours.get(label, ""), symbols.get(label, "")) for label in labels)
            made.append(Filter(axis=axis, title=AXIS_NAMES[axis], choices=choices))
    views = [view for view in VIEWS if any(view in point.leaks for point in found.points)]
    if len(views) > 1:
        choices = tuple((view, VIEW_NAMES[view], "", "") for view in views)
        made.append(Filter(axis="view", title=AXIS_NAMES["view"], choices=choices))
    return made


def _roc_settings(found: Results) -> list[tuple[str, str, dict[str, str]]]:
    """Return (value, name, place) of each configuration that has a ROC; first, with a guarantee, what leaks most."""
    audited = [each for each in found.settings if each.leakage is not None]
    audited.sort(key=lambda each: (each.private, each.leakage.mean if each.leakage else 0.0), reverse=True)
    return [(" / ".join(each.labels), each.name, dict(zip(AXES, each.labels, strict=True))) for each in audited]


def _table_rows(table: Table) -> list[tuple[dict[str, str], tuple[Value, ...]]]:
    """Return the table's rows, each with what filters read of it."""
    axes = [(axis, table.columns.index(axis)) for axis in (*AXES, "view") if axis in table.columns]
    return [({axis: str(row[i]) for axis, i in axes}, row) for row in table.rows[:MOST_ROWS]]


def _text(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _examples(found: Results) -> list[Example]:
    """Return texts that attacks found, the best of each configuration and view, the worst leak first."""
    made = []
    for point in found.points:
        for view, each in point.record.get("audit", {}).get("reconstruction", {}).items():
            best = max(each.get("examples", ()), key=lambda example: example["score"], default=None)
            if best is not None:
                made.append(_example(point.cell, view, each["attack"], best))
    return sorted(made, key=lambda example: -example.score)[:MOST_EXAMPLES]


def _example(cell: Any, view: str, attack: str, best: Mapping[str, Any]) -> Example:
    return Example(
        place={**dict(zip(AXES, cell.labels, strict=True)), "view": view},
        name=f"{cell.name}: {VIEW_NAMES[view]}, {attack}",
        truth=str(best["truth"]),
        found=str(best["found"]),
        prior=str(best["prior"]),
        score=float(best["score"]),
    )


__all__ = ["render", "write_figures", "write_page"]
