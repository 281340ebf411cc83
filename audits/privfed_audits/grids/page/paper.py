"""The figures of the page as PNG and SVG, drawn with matplotlib for a paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from privfed.types import VIEWS
from privfed_audits.grids.measures import Setting
from privfed_audits.grids.page.style import VIEW_DASH, VIEW_NAMES, Style, families
from privfed_audits.grids.results import Results
from privfed_audits.statistics import Estimate

GREY = "#7d8a99"
LINES = {"dot": ":", "dash": "--", "solid": "-"}
SIZE = (4.6, 3.3)
_LOOK: dict[str, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a label called "$" is a label
    "svg.hashsalt": "privfed/curves",
}


def draw(found: Results, style: Style, folder: Path) -> None:
    """Write each figure that there are results for."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    drawn: Mapping[str, Callable[[Any, Results, Style], bool]] = {
        "utility": _utility,
        "leakage": _leakage,
        "roc": _roc,
        "front": _front,
        "matched": _matched,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        for name, paint in drawn.items():
            figure = Figure(figsize=SIZE)
            if paint(figure.add_subplot(), found, style):
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                figure.savefig(folder / f"{name}.png", dpi=220)


def _utility(axes: Any, found: Results, style: Style) -> bool:
    groups = families(found)
    for index, ((tuning, codec, _), group) in enumerate(groups.items()):
        shift = 1.02 ** (index - (len(groups) - 1) / 2)
        axes.errorbar(
            [style.at(each.epsilon) * shift for each in group],
            [style.score(each.utility.mean) for each in group],
            yerr=_bars([each.utility for each in group], style.score),
            color=style.colours[tuning],
            marker=style.symbols[codec][1],
            markersize=4,
            linewidth=1,
            capsize=2,
        )
    _epsilon_axis(axes, style)
    axes.set_ylabel(style.score_title)
    _key(axes, style)
    return bool(groups)


def _leakage(axes: Any, found: Results, style: Style) -> bool:
    shown = False
    for each in found.settings:
        for view in VIEWS:
            estimates = each.in_view(view)
            if estimates is not None:
                _leak_mark(axes, each, view, estimates[0], style)
                shown = True
    for leak in (leak for point in found.points for leak in point.leaks.values()):
        if leak.ceiling is not None and leak.accounted is not None:
            axes.plot([leak.accounted / 1.12, leak.accounted * 1.12], [leak.ceiling] * 2, color=GREY, linewidth=2)
    if style.epsilons:
        ends = (min(style.epsilons) * 0.7, max(style.epsilons) * 1.2)
        places = [ends[0] * (ends[1] / ends[0]) ** (i / 40) for i in range(41)]
        axes.plot(places, places, color=GREY, linestyle="--", linewidth=1)
    _epsilon_axis(axes, style)
    axes.set_ylabel("epsilon found by attack")
    axes.set_ylim(0, _leakage_top(found, style))
    _key(axes, style)
    return shown


def _leakage_top(found: Results, style: Style) -> float:
    """Return where the axis ends: above all that is promised or proved. The upper ends of bars prove nothing."""
    leaks = [leak for point in found.points for leak in point.leaks.values()]
    proved = [value for leak in leaks for value in (leak.empirical, leak.ceiling) if value is not None]
    return 1.25 * max([*proved, *style.epsilons, 0.8])


def _leak_mark(axes: Any, each: Setting, view: str, value: Estimate, style: Style) -> None:
    claimed = next(leak.accounted for point in each.points if (leak := point.leak(view)) is not None)
    colour = style.colours[each.labels[0]]
    axes.errorbar(
        [style.at(claimed)],
        [value.mean],
        yerr=_bars([value], float),
        color=colour,
        marker=style.symbols[each.labels[1]][1],
        markerfacecolor=colour if view == "release" else "none",
        markersize=4,
        capsize=2,
        linewidth=0.8,
    )


def _roc(axes: Any, found: Results, style: Style) -> bool:
    """Draw the configuration with a guarantee that leaks most, every view of it."""
    audited = [point for point in found.points if point.leaks]
    if not audited:
        return False
    private = [point for point in audited if point.epsilon is not None] or audited
    worst = max(private, key=lambda point: max(leak.empirical for leak in point.leaks.values()))
    for view in worst.leaks:
        roc = worst.record["audit"]["views"][view]["roc"]
        colour = style.colours[worst.cell.tuning]
        axes.plot(roc["fpr"], roc["tpr"], color=colour, linestyle=LINES[VIEW_DASH[view]], label=VIEW_NAMES[view])
        axes.fill_between(roc["fpr"], roc["low"], roc["high"], color=colour, alpha=0.12, linewidth=0)
        if roc["allowed"] is not None:
            axes.plot(roc["fpr"], roc["allowed"], color="#7a3ea1", linewidth=2.2)
    axes.plot([1e-4, 1], [1e-4, 1], color=GREY, linestyle=":", linewidth=1)
    low = max(1e-4, min(float(x) for x in roc["fpr"] if x > 0))
    axes.set(xscale="log", yscale="log", xlim=(low, 1), ylim=(low, 1.1))
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=worst.cell.name)
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.legend(fontsize=6, frameon=False)
    return True


def _front(axes: Any, found: Results, style: Style) -> bool:
    for each in found.settings:
        colour, on = style.colours[each.labels[0]], each in found.front
        axes.errorbar(
            [each.bytes_run],
            [style.score(each.utility.mean)],
            yerr=_bars([each.utility], style.score),
            color=colour,
            marker=style.symbols[each.labels[1]][1],
            markerfacecolor=colour if on else "none",
            markersize=5 if on else 4,
            alpha=1 if on else 0.5,
            linewidth=0.8,
        )
    if found.choice is not None:
        taken = found.choice.setting
        place = (taken.bytes_run, style.score(taken.utility.mean))
        axes.plot(*place, "o", markersize=12, markerfacecolor="none", markeredgecolor="#b01e1e")
    axes.set(xscale="log", xlabel="bytes that a client sends in the whole run", ylabel=style.score_title)
    _plain(axes.xaxis, unit="B")
    _key(axes, style)
    return bool(found.settings)


def _matched(axes: Any, found: Results, style: Style) -> bool:
    names = [f"{row.tuning}, {row.codec}" for row in found.matched]
    for place, row in enumerate(found.matched):
        for value, filled in ((row.fixed, False), (row.matched, True)):
            colour = style.colours[row.tuning]
            axes.errorbar(
                [value.mean],
                [place],
                xerr=_bars([value], float),
                color=colour,
                marker="o",
                markerfacecolor=colour if filled else "none",
                markersize=4,
                capsize=2,
            )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("AUC of the strongest attack: as set (open), at equal utility (filled)")
    return bool(names)


def _bars(values: list[Estimate], drawn: Callable[[float], float]) -> list[list[float]]:
    lower, upper = [], []
    for value in values:
        high = value.high if math.isfinite(value.high) else value.mean
        ends, middle = sorted((drawn(value.low), drawn(high))), drawn(value.mean)
        lower.append(max(0.0, middle - ends[0]))
        upper.append(max(0.0, ends[1] - middle))
    return [lower, upper]


def _plain(axis: Any, unit: str | None = None) -> None:
    """Number a logarithmic axis in plain text: matplotlib would write powers as mathematics, which is off here."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if unit else (1,)))
    axis.set_major_formatter(EngFormatter(unit) if unit else FuncFormatter(lambda value, _place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _epsilon_axis(axes: Any, style: Style) -> None:
    from matplotlib.ticker import NullLocator

    places, names = style.ticks()
    axes.set_xscale("log")
    axes.set_xticks(places, names)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("accounted epsilon")


def _key(axes: Any, style: Style) -> None:
    """Name each tuning's colour and each codec's symbol once."""
    from matplotlib.lines import Line2D

    tunings = [Line2D([], [], color=colour, label=name) for name, colour in style.colours.items()]
    marks = [
        Line2D([], [], color=GREY, marker=mark, linestyle="none", markersize=4, label=name)
        for name, (_, mark, _) in style.symbols.items()
    ]
    axes.legend(handles=[*tunings, *marks], fontsize=6, frameon=False, ncols=2, loc="best")


__all__ = ["draw"]
