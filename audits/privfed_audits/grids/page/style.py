"""What stands for what on every figure: a colour for each tuning, a symbol for each codec, a line for each view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from privfed_audits.grids.measures import Setting
from privfed_audits.grids.results import Results

# as the labels of a run's report; told apart with the common kinds of colour blindness in this order
COLOURS = (
    "#3b6fb6", "#e08a2e", "#3f9b6d", "#c8508f", "#8b6cc4", "#b9a73a", "#49a9c4", "#a5563f", "#7d8a99", "#6f8f2f",
)  # fmt: skip
# plotly's name, matplotlib's, and the character that stands in the page's key
SYMBOLS = (
    ("circle", "o", "●"),
    ("square", "s", "■"),
    ("triangle-up", "^", "▲"),
    ("diamond", "D", "◆"),
    ("cross", "P", "✚"),
    ("star", "*", "★"),
    ("triangle-down", "v", "▼"),
    ("x", "X", "✖"),
)
VIEW_DASH = {"individual": "dot", "aggregate": "dash", "release": "solid"}
VIEW_NAMES = {
    "individual": "one client's messages",
    "aggregate": "the sum of a round",
    "release": "the trained model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """The grid's colours and symbols, and where "no privacy" is drawn on an axis of epsilon.

    Attributes:
        colours: By tuning.
        symbols: By codec: plotly's name, matplotlib's, a character.
        epsilons: The accounted epsilons of the grid, rising.
        nowhere: The place of settings without a guarantee on a logarithmic axis of epsilon.
        utility: What utility is.
    """

    colours: Mapping[str, str]
    symbols: Mapping[str, tuple[str, str, str]]
    epsilons: tuple[float, ...]
    nowhere: float
    utility: str

    def at(self, epsilon: float | None) -> float:
        """Return the place of an epsilon."""
        return self.nowhere if epsilon is None else epsilon

    def ticks(self) -> tuple[list[float], list[str]]:
        """Return the places and names of an axis of epsilon; those too close to their neighbour have no name."""
        places: list[float] = []
        for epsilon in self.epsilons:
            if not places or epsilon > 1.15 * places[-1]:
                places.append(epsilon)
        names = [f"{epsilon:.3g}" for epsilon in places]
        return [*places, self.nowhere], [*names, "none"]

    def score(self, value: float) -> float:
        """Return a utility as it is drawn: in percent, or a perplexity."""
        return -value if self.utility == "perplexity" else 100 * value

    @property
    def score_title(self) -> str:
        """The name of the utility axis."""
        return "test perplexity (lower is better)" if self.utility == "perplexity" else f"test {self.utility} (%)"


def style_of(found: Results) -> Style:
    """Return the style of a grid."""
    tunings, codecs = found.grid.labels("tuning"), found.grid.labels("codec")
    epsilons = sorted({each.epsilon for each in found.settings if each.epsilon is not None})
    return Style(
        colours={name: COLOURS[i % len(COLOURS)] for i, name in enumerate(tunings)},
        symbols={name: SYMBOLS[i % len(SYMBOLS)] for i, name in enumerate(codecs)},
        epsilons=tuple(epsilons),
        nowhere=2.5 * epsilons[-1] if epsilons else 10.0,
        utility=found.utility,
    )


def families(found: Results) -> dict[tuple[str, str, str], list[Setting]]:
    """Return the settings of each (tuning, codec, kind of sum), by rising epsilon, those without any last."""
    groups: dict[tuple[str, str, str], list[Setting]] = {}
    for each in found.settings:
        groups.setdefault((each.labels[0], each.labels[1], each.labels[3]), []).append(each)
    return {
        key: sorted(group, key=lambda each: float("inf") if each.epsilon is None else each.epsilon)
        for key, group in groups.items()
    }


__all__ = ["SYMBOLS", "VIEW_DASH", "VIEW_NAMES", "Style", "families", "style_of"]
