"""The charts of the report. Each returns SVG, the sentence that stands for it, and the table behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from privfed.report import canvas as c
from privfed.report.load import Eval, Metrics, Partition
from privfed.report.text import epsilon_text, percent_text, percent_up, perplexity_text
from privfed.report.tradeoff import Curve, hit_rate_bound

WIDTH, HEIGHT = 440.0, 260.0
MOST_BARS = 40
_SHADES = 6
_FALSE_ALARMS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture, what it shows in words, and its numbers."""

    title: str
    svg: str
    alt: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    key: tuple[tuple[str, str], ...] = ()


def _positions(metrics: Metrics) -> int:
    """Return how many rounds of warm start come before round 1 on the shared axis."""
    rounds = [line.round for line in metrics.evals if line.phase == "warm_start"]
    rounds += [line.round for line in metrics.rounds if line.phase == "warm_start"]
    return max(rounds, default=0)


def _round_axis(axes: Any, warm: int, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.02 * max(last, 1), max(last, 1) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("round" if not warm else f"round (the first {warm}: warm start)")
    axes.tick_params(length=3)
    if 0 < warm < last:
        axes.axvline(warm, color=c.LINE, linewidth=1)


def quality_chart(metrics: Metrics) -> Chart | None:
    """Return the score after each round against what costs nothing, or None where nothing was scored."""
    if any(line.metric == "perplexity" for line in metrics.evals):
        return perplexity_chart(metrics)
    return accuracy_chart(metrics)


def _places(metrics: Metrics, name: str) -> list[tuple[int, Eval, float]]:
    """Return (place on the shared axis, line, value) of each evaluation in which ``name`` is a number."""
    warm = _positions(metrics)
    found: dict[int, tuple[int, Eval, float]] = {}
    for line in metrics.evals:
        value = getattr(line, name)
        if value is not None and math.isfinite(value):
            place = line.round + (0 if line.phase == "warm_start" else warm)
            found[place] = (place, line, value)
    return [found[place] for place in sorted(found)]


def accuracy_chart(metrics: Metrics) -> Chart | None:
    """Return accuracy and macro-F1 after each round against always giving the commonest answer."""
    places = _places(metrics, "accuracy")
    if not places:
        return None
    x = [place for place, _, _ in places]
    accuracy = [value for _, _, value in places]
    f1 = [(place, line.macro_f1) for place, line, _ in places if line.macro_f1 is not None]
    majority = next((line.majority for _, line, _ in places if line.majority is not None), None)
    ends = {"accuracy": accuracy[-1]}
    with c.Canvas("accuracy", WIDTH, HEIGHT) as (canvas, axes):
        axes.plot(x, accuracy, color=c.MODEL, linewidth=2.4, marker="o", markersize=4, clip_on=False)
        if f1:
            axes.plot([i for i, _ in f1], [v for _, v in f1], color=c.MODEL, linewidth=1.4, linestyle="--")
            ends["macro-F1"] = float(f1[-1][1])
        if majority is not None:
            axes.axhline(majority, color=c.MUTED, linewidth=1.2, linestyle=":")
            ends["commonest\nanswer"] = majority
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.grid(axis="y", color=c.LINE, linewidth=0.6)
        _round_axis(axes, _positions(metrics), x[-1])
        _label_ends(axes, ends, {"accuracy": c.MODEL, "macro-F1": c.MODEL})
        compared = "" if majority is None else f"; always the commonest answer scores {percent_text(majority)}"
        alt = (
            f"Line chart: accuracy goes from {percent_text(accuracy[0])} to {percent_text(accuracy[-1])} "
            f"over {x[-1]} rounds{compared}."
        )
        svg = canvas.svg(alt)
    return Chart(
        title="Accuracy after each round",
        svg=svg,
        alt=alt,
        headers=("Phase", "Round", "Accuracy", "Macro-F1", "Matthews", "Loss"),
        rows=tuple(
            (*_round_cells(s), percent_text(v), _number(s.macro_f1), _number(s.matthews), _number(s.loss))
            for _, s, v in places
        ),
    )


def perplexity_chart(metrics: Metrics) -> Chart | None:
    """Return perplexity after each round against the base model's before any tuning; lower is better."""
    places = _places(metrics, "perplexity")
    if not places:
        return None
    x = [place for place, _, _ in places]
    perplexity = [value for _, _, value in places]
    base = perplexity[0] if places[0][1].round == 0 else None
    high, low = max(perplexity), min(perplexity)
    gap = max(high - low, 0.05 * high)
    with c.Canvas("perplexity", WIDTH, HEIGHT) as (canvas, axes):
        axes.plot(x, perplexity, color=c.MODEL, linewidth=2.4, marker="o", markersize=4, clip_on=False)
        ends = {"this model": perplexity[-1]}
        if base is not None:
            axes.axhline(base, color=c.MUTED, linewidth=1.2, linestyle=":")
            ends["base\nmodel"] = base
        axes.set_ylim(max(0, low - 0.15 * gap), high + 0.15 * gap)
        axes.grid(axis="y", color=c.LINE, linewidth=0.6)
        _round_axis(axes, 0, x[-1])
        _label_ends(axes, ends, {"this model": c.MODEL}, 0.12 * gap)
        compared = "" if base is None else "; the first is the base model before any tuning"
        alt = (
            f"Line chart, lower is better: perplexity goes from {perplexity_text(perplexity[0])} to "
            f"{perplexity_text(perplexity[-1])} over {x[-1]} rounds{compared}."
        )
        svg = canvas.svg(alt)
    return Chart(
        title="Perplexity after each round (lower is better)",
        svg=svg,
        alt=alt,
        headers=("Phase", "Round", "Perplexity", "Next token right", "Loss a token"),
        rows=tuple(
            (
                *_round_cells(s),
                perplexity_text(v),
                "" if s.token_accuracy is None else percent_text(s.token_accuracy),
                _number(s.loss),
            )
            for _, s, v in places
        ),
    )


def _round_cells(line: Eval) -> tuple[str, str]:
    return line.phase.replace("_", " "), str(line.round)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _label_ends(axes: Any, ends: dict[str, float], colours: dict[str, str], gap: float = 0.07) -> None:
    """Name each line at its right end, pushed apart where they would overlap."""
    previous = -math.inf
    for name, value in sorted(ends.items(), key=lambda item: item[1]):
        previous = max(value, previous + gap)
        axes.annotate(
            name,
            (1, previous),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colours.get(name, c.MUTED),
            fontweight="bold" if name in ("accuracy", "this model") else "normal",
        )


def budget_chart(metrics: Metrics, cap: float | None) -> Chart | None:
    """Return the epsilon that was spent after each round, and the cap."""
    warm = _positions(metrics)
    points = [
        (line.round + (0 if line.phase == "warm_start" else warm), line.epsilon, line)
        for line in metrics.rounds
        if line.epsilon is not None and math.isfinite(line.epsilon)
    ]
    if not points:
        return None
    x, y = [0, *(p[0] for p in points)], [0.0, *(p[1] for p in points)]
    planned = metrics.start.rounds if metrics.start else 0
    capped = "" if cap is None else f" of at most {epsilon_text(cap)}"
    with c.Canvas("budget", WIDTH, HEIGHT) as (canvas, axes):
        axes.fill_between(x, y, step="post", color=c.PRIVACY, alpha=0.14, linewidth=0)
        axes.step(x, y, where="post", color=c.PRIVACY, linewidth=2.4)
        axes.plot(x[-1:], y[-1:], "o", color=c.PRIVACY, markersize=5, clip_on=False)
        top = max(y[-1], cap or 0) * 1.15
        axes.set_ylim(0, top)
        if cap is not None:
            axes.axhline(cap, color=c.MUTED, linewidth=1.2, linestyle=":")
        axes.grid(axis="y", color=c.LINE, linewidth=0.6)
        axes.set_ylabel("epsilon spent")
        _round_axis(axes, warm, max(x[-1], planned))
        ends = {"spent": y[-1]} | ({} if cap is None else {"cap": cap})
        _label_ends(axes, ends, {"spent": c.PRIVACY}, gap=0.07 * top)
        alt = f"Step chart: {epsilon_text(y[-1])} epsilon spent{capped} after {x[-1]} rounds."
        svg = canvas.svg(alt)
    return Chart(
        title="Privacy budget spent",
        svg=svg,
        alt=alt,
        headers=("Phase", "Round", "Epsilon so far", "Clients"),
        rows=tuple(
            (
                line.phase.replace("_", " "),
                str(line.round),
                epsilon_text(value),
                f"{line.survivors} of {line.cohort}",
            )
            for _, value, line in points
        ),
    )


def attacker_chart(curve: Curve) -> Chart:
    """Return the limit that an (epsilon, delta) curve puts on every attacker."""
    grid = [i / 200 for i in range(201)]
    bound = [hit_rate_bound(curve, a) for a in grid]
    rows = tuple((percent_text(a), percent_up(hit_rate_bound(curve, a))) for a in _FALSE_ALARMS)
    with c.Canvas("attacker", WIDTH, 300) as (canvas, axes):
        axes.fill_between(grid, grid, bound, color=c.PRIVACY, alpha=0.14, linewidth=0)
        axes.plot(grid, bound, color=c.PRIVACY, linewidth=2.4, clip_on=False)
        axes.plot([0, 1], [0, 1], color=c.MUTED, linewidth=1.2, linestyle=":")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        ticks, names = [0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"]
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names)
        axes.grid(color=c.LINE, linewidth=0.6)
        axes.set_xlabel("wrongly accused")
        axes.set_ylabel("rightly recognised")
        axes.text(0.6, 0.55, "guessing", ha="left", va="top", color=c.MUTED)
        alt = (
            f"Curve: the best possible attacker, wrongly accusing {rows[1][0]}, recognises at most "
            f"{rows[1][1]} of those that were used; wrongly accusing {rows[3][0]}, at most {rows[3][1]}."
        )
        svg = canvas.svg(alt)
    return Chart(
        title="The most that any attacker can do",
        svg=svg,
        alt=alt,
        headers=("Wrongly accused", "Rightly recognised, at most"),
        rows=rows,
    )


def partition_chart(partition: Partition) -> Chart | None:
    """Return who holds how much of what: stacked bars, or a heat map where those would be too many."""
    if not partition.clients:
        return None
    if not partition.label_names:  # records without classes: how many of them
        whole = tuple(client.model_copy(update={"label_counts": (client.size,)}) for client in partition.clients)
        partition = partition.model_copy(update={"label_names": ("rows",), "clients": whole})
    clients = sorted(partition.clients, key=lambda client: (-client.size, client.client_id))
    sizes = [client.size for client in clients]
    alt = f"{len(clients)} clients hold between {min(sizes):,} and {max(sizes):,} rows" + (
        f" of {len(partition.label_names)} kinds." if len(partition.label_names) > 1 else "."
    )
    stacked = len(clients) <= MOST_BARS and len(partition.label_names) <= len(c.LABELS)
    draw = _stacked_bars if stacked else _heat_map
    return Chart(
        title="Who holds what",
        svg=draw(clients, partition.label_names, alt),
        alt=alt,
        headers=("Client", "Rows", *partition.label_names),
        rows=tuple((p.client_id, f"{p.size:,}", *(f"{n:,}" for n in p.label_counts)) for p in clients),
        key=tuple((name, f"label-{i}") for i, name in enumerate(partition.label_names)) if stacked else (),
    )


def _short(text: str, length: int = 18) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _boxes(axes: Any, boxes: Sequence[tuple[float, float, float, float]], colour: str, alpha: float = 1) -> None:
    """Draw many rectangles (x, y, width, height) as one path, which keeps the file small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not boxes:
        return
    outline = Path.make_compound_path(
        *(Path([(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)], closed=True) for x, y, w, h in boxes)
    )
    axes.add_patch(PathPatch(outline, facecolor=colour, edgecolor="none", alpha=alpha, clip_on=False))


def _stacked_bars(clients: Sequence[Any], labels: Sequence[str], alt: str) -> str:
    lefts = [0.0] * len(clients)
    with c.Canvas("partition", WIDTH, 50 + 17 * len(clients)) as (canvas, axes):
        for index in range(len(labels)):
            boxes = []
            for row, client in enumerate(clients):
                width = client.label_counts[index]
                if width:
                    boxes.append((lefts[row], row - 0.38, width, 0.76))
                lefts[row] += width
            _boxes(axes, boxes, c.LABELS[index])
        axes.set_xlim(0, max(*lefts, 1))
        axes.set_ylim(len(clients) - 0.4, -0.6)
        axes.set_yticks(range(len(clients)), [_short(client.client_id) for client in clients])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("rows of training data")
        return str(canvas.svg(alt))


def _heat_map(clients: Sequence[Any], labels: Sequence[str], alt: str) -> str:
    """Draw labels down, clients across (largest first); stronger colour, larger share."""
    shades: dict[int, list[tuple[float, float, float, float]]] = {}
    shares = [[n / max(sum(p.label_counts), 1) for n in p.label_counts] for p in clients]
    largest = max((share for column in shares for share in column), default=1) or 1
    for column, row_shares in enumerate(shares):
        for row, share in enumerate(row_shares):
            if share:
                # The root keeps small shares visible where one client holds a single label.
                level = max(1, math.ceil(math.sqrt(share / largest) * _SHADES))
                shades.setdefault(level, []).append((column, row, 1, 1))
    with c.Canvas("partition", WIDTH, min(80 + 17 * len(labels), 620)) as (canvas, axes):
        for level, boxes in sorted(shades.items()):
            _boxes(axes, boxes, c.MODEL, alpha=level / _SHADES)
        axes.set_xlim(0, len(clients))
        axes.set_ylim(len(labels), 0)
        step = max(1, math.ceil(len(labels) / 32))
        shown = range(0, len(labels), step)
        axes.set_yticks([i + 0.5 for i in shown], [_short(labels[i]) for i in shown])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("clients, from the largest to the smallest")
        return str(canvas.svg(alt))
