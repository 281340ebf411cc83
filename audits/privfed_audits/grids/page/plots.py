"""The figures of the page, made with plotly. Each trace says in its ``meta`` which filters it answers to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from privfed.report.text import bytes_text
from privfed.types import VIEWS
from privfed_audits.grids.compare import describe
from privfed_audits.grids.grid import AXES
from privfed_audits.grids.measures import Leak, Point, Setting
from privfed_audits.grids.page.style import VIEW_DASH, VIEW_NAMES, Style, families
from privfed_audits.grids.results import Results
from privfed_audits.statistics import Estimate

GREY = "#7d8a99"
# neighbours on an axis of epsilon are moved apart by this factor, so that their intervals do not hide one another
APART = 1.025
# where many marks stand at one epsilon, they are spread over a range of this factor
SPREAD = 1.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A figure of the page.

    Attributes:
        name: Of its element.
        figure: As plotly has it.
        alt: What it shows, in a sentence.
        table: The name of the table behind it.
    """

    name: str
    title: str
    lead: str
    figure: go.Figure
    alt: str
    table: str


def plots(found: Results, style: Style) -> list[Plot]:
    """Return the figures that there are results for."""
    made = [utility_plot(found, style), front_plot(found, style, "bytes"), leakage_plot(found, style)]
    made += [roc_plot(found, style), front_plot(found, style, "leakage"), matched_plot(found, style)]
    return [each for each in made if each is not None]


def utility_plot(found: Results, style: Style) -> Plot | None:
    """Return utility against the accounted epsilon."""
    if not found.settings:
        return None
    figure = go.Figure()
    groups = families(found)
    for index, (key, group) in enumerate(groups.items()):
        shift = APART ** (index - (len(groups) - 1) / 2)
        figure.add_trace(
            go.Scatter(
                x=[style.at(each.epsilon) * shift for each in group],
                y=[style.score(each.utility.mean) for each in group],
                error_y=_bars([each.utility for each in group], style.score),
                text=[f"<b>{each.name}</b><br>{describe(each, style.utility)}" for each in group],
                hovertemplate="%{text}<extra></extra>",
                mode="lines+markers",
                name=" · ".join(key[:2]),
                meta=dict(zip(("tuning", "codec", "secagg"), key, strict=True)),
                **_drawn(style, key[0], key[1]),
            )
        )
    _epsilon_axis(figure, style)
    figure.update_yaxes(title=style.score_title)
    best = max(found.settings, key=lambda each: each.utility.mean)
    over = "over seeds" if len(found.grid.seeds) > 1 else "over the test rows, for there is one seed"
    return Plot(
        name="utility",
        title="What privacy costs in utility",
        lead=f"Each line is one tuning with one codec; bars are 95 % intervals {over}.",
        figure=figure,
        alt=f"Utility against accounted epsilon. The most useful is {best.name}: {describe(best, style.utility)}.",
        table="utility",
    )


def leakage_plot(found: Results, style: Style) -> Plot | None:
    """Return the epsilon that attacks proved against the one that the accountant states."""
    rows = [(each, view) for each in found.settings for view in VIEWS if each.in_view(view) is not None]
    if not rows:
        return None
    figure = go.Figure()
    _add_diagonal(figure, style)
    for each, view in rows:
        estimates = each.in_view(view)
        leaks = [leak for point in each.points if (leak := point.leak(view)) is not None]
        if estimates is not None:
            figure.add_trace(_leak_trace(each, view, leaks, estimates[0], style, _aside(found, each, view)))
    _add_ceilings(figure, found)
    _epsilon_axis(figure, style)
    figure.update_yaxes(title="found by attack (lower bound)", range=[-0.3, _ceiling_of(found, style)])
    top = max(most for point in found.points if (most := _most(point)) is not None)
    return Plot(
        name="leakage",
        title="What attacks prove, against what is promised",
        lead="On or above the line, an attack would contradict the promise. The short bars are the most that the same "
        "bound could have shown against an ideal mechanism of that epsilon: what is above them is the bound's own gap. "
        "Filled: the trained model; open: the sum of a round; open with a dot: one client's messages.",
        figure=figure,
        alt=f"Empirical against accounted epsilon, with the line where they are equal. The largest found is {top:.2f}.",
        table="leakage",
    )


def _aside(found: Results, each: Setting, view: str) -> float:
    """Return the factor by which a mark stands beside its epsilon: tuning by tuning, then codec, then view."""
    tunings, codecs = found.grid.labels("tuning"), found.grid.labels("codec")
    place = (tunings.index(each.labels[0]) * len(codecs) + codecs.index(each.labels[1])) * len(VIEWS)
    share = (place + VIEWS.index(view) + 0.5) / (len(tunings) * len(codecs) * len(VIEWS)) - 0.5
    return float(SPREAD**share)


def _most(point: Point) -> float | None:
    leak = point.leak()
    return None if leak is None else leak.empirical


def _ceiling_of(found: Results, style: Style) -> float:
    """Return the top of the axis: intervals may end far above what there is to see."""
    most = [leak for point in found.points if (leak := _most(point)) is not None]
    return 1.15 * max([*most, *style.epsilons, 1.0])


def _leak_trace(each: Setting, view: str, leaks: list[Leak], value: Estimate, style: Style, shift: float) -> go.Scatter:
    tuning, codec, _, secagg = each.labels
    symbol = style.symbols[codec][0] + ("" if view == "release" else "-open" if view == "aggregate" else "-open-dot")
    claimed = leaks[0].accounted
    text = (
        f"<b>{each.name}</b><br>{VIEW_NAMES[view]}<br>found {value.mean:.2f}, accounted "
        f"{'none' if claimed is None else f'{claimed:.2f}'}<br>{leaks[0].attack}, {leaks[0].bound}, "
        f"{leaks[0].canaries} canaries"
    )
    return go.Scatter(
        x=[style.at(claimed) * shift],
        y=[value.mean],
        error_y={**_bars([value], float), "color": _faint(style.colours[tuning], 0.55), "width": 0},
        text=[text],
        hovertemplate="%{text}<extra></extra>",
        mode="markers",
        marker={"color": style.colours[tuning], "symbol": symbol, "size": 8},
        name=each.name,
        meta={"tuning": tuning, "codec": codec, "privacy": each.labels[2], "secagg": secagg, "view": view},
    )


def _add_diagonal(figure: go.Figure, style: Style) -> None:
    if not style.epsilons:
        return
    ends = (min(style.epsilons) * 0.7, max(style.epsilons) * 1.2)
    places = [ends[0] * (ends[1] / ends[0]) ** (i / 40) for i in range(41)]  # a curve where one axis is logarithmic
    line = {"color": GREY, "width": 1.5, "dash": "dash"}
    figure.add_trace(go.Scatter(x=places, y=places, mode="lines", line=line, hoverinfo="skip"))
    figure.add_annotation(
        x=math.log10(ends[1]), y=ends[1], text="equal", showarrow=False, yshift=10, font={"color": GREY, "size": 11}
    )


def _add_ceilings(figure: go.Figure, found: Results) -> None:
    """Draw, for each accounted epsilon, the most that the bound could have shown."""
    ceilings: dict[tuple[str, float], list[float]] = {}
    for leak, view in ((leak, view) for point in found.points for view, leak in point.leaks.items()):
        if leak.ceiling is not None and leak.accounted is not None:
            ceilings.setdefault((view, round(leak.accounted, 2)), []).append(leak.ceiling)
    for (view, epsilon), values in ceilings.items():
        mean = sum(values) / len(values)
        figure.add_trace(
            go.Scatter(
                x=[epsilon / SPREAD**0.5, epsilon * SPREAD**0.5],
                y=[mean, mean],
                mode="lines",
                line={"color": GREY, "width": 3},
                text=[f"the bound's ceiling at epsilon {epsilon:g}: {mean:.2f} ({VIEW_NAMES[view]})"] * 2,
                hovertemplate="%{text}<extra></extra>",
                meta={"view": view},
            )
        )


def roc_plot(found: Results, style: Style) -> Plot | None:
    """Return the attacks' curves, one setting at a time, with what the accountant allows."""
    figure = go.Figure()
    floor = 1.0
    for point in found.points:
        for view in point.leaks:
            floor = min(floor, _add_roc(figure, point, view, style))
    if not figure.data:
        return None
    low = max(1e-4, floor)
    figure.add_trace(
        go.Scatter(x=[low, 1], y=[low, 1], mode="lines", line={"color": GREY, "dash": "dot"}, hoverinfo="skip")
    )
    limits = [math.log10(low), 0.02]
    figure.update_xaxes(type="log", range=limits, title="wrongly accused (false positives)", **_tens(low))
    figure.update_yaxes(type="log", range=limits, title="rightly recognised", **_tens(low))
    worst = max(found.points, key=lambda point: _most(point) or 0.0)
    leak = worst.leak()
    at = leak.tpr if leak else None
    said = (
        f"{100 * at[1]:.0f} % recognised at {100 * at[0]:g} % wrongly accused" if at else "too few canaries for a rate"
    )
    return Plot(
        name="roc",
        title="How well members can be told",
        lead="One configuration at a time; bands are 95 % intervals. The thick line is the most that the accounted "
        "guarantee allows any attacker; without a guarantee there is none.",
        figure=figure,
        alt=f"Log-log curves of true against false positives. The strongest attack is on {worst.cell.name}: {said}.",
        table="roc",
    )


def _add_roc(figure: go.Figure, point: Point, view: str, style: Style) -> float:
    """Add the curve of one cell and view, its band and its limit; return its smallest false positive rate."""
    roc = point.record["audit"]["views"][view]["roc"]
    keep = [i for i, (x, y) in enumerate(zip(roc["fpr"], roc["tpr"], strict=True)) if x > 0 and y > 0]
    if not keep:
        return 1.0
    fpr, tpr, low, high = ([roc[name][i] for i in keep] for name in ("fpr", "tpr", "low", "high"))
    meta = {**dict(zip(AXES, point.cell.labels, strict=True)), "view": view, "setting": " / ".join(point.cell.labels)}
    colour = style.colours[point.cell.tuning]
    band = [max(value, 1e-6) for value in low]
    figure.add_trace(
        go.Scatter(
            x=[*fpr, *fpr[::-1]],
            y=[*high, *band[::-1]],
            fill="toself",
            fillcolor=_faint(colour),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            meta=meta,
        )
    )
    figure.add_trace(
        go.Scatter(
            x=fpr,
            y=tpr,
            mode="lines",
            line={"color": colour, "width": 2.2, "dash": VIEW_DASH[view]},
            name=f"{VIEW_NAMES[view]}, seed {point.cell.seed}",
            hovertemplate=f"{VIEW_NAMES[view]}<br>%{{x:.3g}} wrongly, %{{y:.3g}} rightly<extra></extra>",
            meta=meta,
        )
    )
    if roc["allowed"] is not None:
        figure.add_trace(
            go.Scatter(
                x=fpr,
                y=[roc["allowed"][i] for i in keep],
                mode="lines",
                line={"color": "#7a3ea1", "width": 3.5},
                name="the most that the guarantee allows",
                hovertemplate="allowed: %{y:.3g} at %{x:.3g}<extra></extra>",
                meta=meta,
            )
        )
    return float(min(fpr))


def front_plot(found: Results, style: Style, against: str) -> Plot | None:
    """Return utility against bytes or leakage, the front filled, the point to take ringed."""
    shown = [each for each in found.settings if against == "bytes" or each.leakage is not None]
    if not shown:
        return None
    figure = go.Figure()
    taken = found.choice.setting if found.choice else None
    for each in shown:
        figure.add_trace(_front_trace(each, found, style, against))
    if taken in shown and taken is not None:
        figure.add_trace(_ring(taken, style, against))
    if against == "bytes":
        figure.update_xaxes(type="log", title="sent by a client in the whole run", **_sizes(shown))
    else:
        figure.update_xaxes(title="epsilon found by attack", rangemode="tozero")
    figure.update_yaxes(title=style.score_title)
    names = "; ".join(each.name for each in found.front)
    return Plot(
        name=f"front-{against}",
        title="Utility against bytes" if against == "bytes" else "Utility against leakage",
        lead="Filled: none is at least as good in utility, leakage and bytes, and clearly better in one of them."
        if against == "bytes"
        else "The same configurations; up and to the left is better. The ring is the one to take.",
        figure=figure,
        alt=f"Utility against {against}; on the front: {names}.",
        table="front",
    )


def _front_trace(each: Setting, found: Results, style: Style, against: str) -> go.Scatter:
    tuning, codec, privacy, secagg = each.labels
    on = each in found.front
    leak = each.leakage
    return go.Scatter(
        x=[each.bytes_run if against == "bytes" else leak.mean if leak else None],
        y=[style.score(each.utility.mean)],
        error_y=_bars([each.utility], style.score),
        error_x=None if against == "bytes" or leak is None else _bars([leak], float),
        text=[f"<b>{each.name}</b>{' (front)' if on else ''}<br>{describe(each, style.utility)}"],
        hovertemplate="%{text}<extra></extra>",
        mode="markers",
        marker={
            "color": style.colours[tuning],
            "symbol": style.symbols[codec][0] + ("" if on else "-open"),
            "size": 11 if on else 8,
            "opacity": 1 if on else 0.55,
        },
        name=each.name,
        meta={"tuning": tuning, "codec": codec, "privacy": privacy, "secagg": secagg},
    )


def _ring(taken: Setting, style: Style, against: str) -> go.Scatter:
    x = taken.bytes_run if against == "bytes" else taken.leakage.mean if taken.leakage else None
    return go.Scatter(
        x=[x],
        y=[style.score(taken.utility.mean)],
        mode="markers+text",
        text=["take this"],
        textposition="bottom center",
        marker={"symbol": "circle-open", "size": 22, "color": "#b01e1e", "line": {"width": 2.5}},
        hoverinfo="skip",
    )


def matched_plot(found: Results, style: Style) -> Plot | None:
    """Return how much each tuning leaks as it was set, and at the utility that all reach."""
    if not found.matched:
        return None
    figure = go.Figure()
    for row in found.matched:
        for name, value, symbol in (("as set", row.fixed, "circle-open"), ("at equal utility", row.matched, "circle")):
            figure.add_trace(
                go.Scatter(
                    x=[value.mean],
                    y=[[row.codec], [row.tuning]],
                    error_x=_bars([value], float),
                    mode="markers",
                    marker={"color": style.colours[row.tuning], "symbol": symbol, "size": 11},
                    hovertemplate=f"{row.tuning}, {row.codec}, {name}: AUC %{{x:.3f}}<extra></extra>",
                    meta={"tuning": row.tuning, "codec": row.codec, "secagg": row.secagg},
                )
            )
    figure.update_xaxes(title="AUC (0.5: guessing)")
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(height=110 + 26 * len(found.matched))
    level = style.score(found.matched[0].utility)
    return Plot(
        name="matched",
        title="Leakage at equal utility",
        lead=f"Open: each tuning's most useful cell. Filled: at the utility that all reach with the same codec (about "
        f"{level:.1f} for the first), interpolated between budgets. “It leaks less” can be “it fits less”.",
        figure=figure,
        alt="Attack strength of each tuning as it was set and at equal utility, with 95 % intervals.",
        table="matched",
    )


def _drawn(style: Style, tuning: str, codec: str) -> dict[str, Any]:
    colour = style.colours[tuning]
    return {"line": {"color": colour, "width": 1.6}, "marker": {"symbol": style.symbols[codec][0], "size": 9}}


def _bars(values: Sequence[Estimate], drawn: Any) -> dict[str, Any]:
    """Return error bars; an end without limit is left off."""
    ends = [sorted((drawn(v.low), drawn(v.high))) if math.isfinite(v.high) else [drawn(v.low)] * 2 for v in values]
    middle = [drawn(value.mean) for value in values]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, high - y) for (_, high), y in zip(ends, middle, strict=True)],
        "arrayminus": [max(0.0, y - low) for (low, _), y in zip(ends, middle, strict=True)],
        "thickness": 1.2,
        "width": 3,
    }


def _epsilon_axis(figure: go.Figure, style: Style) -> None:
    places, names = style.ticks()
    figure.update_xaxes(type="log", tickvals=places, ticktext=names, title="accounted epsilon")


def _tens(low: float) -> dict[str, Any]:
    powers = range(math.floor(math.log10(low)), 1)
    return {"tickvals": [10.0**p for p in powers], "ticktext": [f"{100 * 10.0**p:g}%" for p in powers]}


def _sizes(shown: Sequence[Setting]) -> dict[str, Any]:
    """Return ticks at round numbers of bytes around those that were sent."""
    low, high = min(each.bytes_run for each in shown) / 1.5, max(each.bytes_run for each in shown) * 1.5
    steps = (1, 2, 5) if high / low < 50 else (1, 3) if high / low < 2000 else (1,)
    places = [step * 10.0**power for power in range(13) for step in steps if low <= step * 10.0**power <= high]
    return {"tickvals": places, "ticktext": [bytes_text(place).replace(".0 ", " ") for place in places]}


def _faint(colour: str, alpha: float = 0.14) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


__all__ = ["Plot", "plots"]
