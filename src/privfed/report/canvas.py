"""From a matplotlib figure to a piece of inline SVG that follows the page's colours and repeats to the byte.

Charts are drawn in placeholder colours; each is replaced by a CSS variable, so the same SVG serves the light,
the dark and the printed page.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import Any

# Distinct colours that nothing else draws with; matplotlib writes them as #rrggbb.
COLOURS = {
    "ink": "#000001",
    "muted": "#000002",
    "line": "#000003",
    "model": "#000004",
    "privacy": "#000005",
    "card": "#000006",
    **{f"label-{index}": f"#0000{16 + index:02x}" for index in range(10)},
}
INK, MUTED, LINE = COLOURS["ink"], COLOURS["muted"], COLOURS["line"]
MODEL, PRIVACY, CARD = COLOURS["model"], COLOURS["privacy"], COLOURS["card"]
LABELS = tuple(COLOURS[f"label-{index}"] for index in range(10))
FONT = 12.0

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": FONT,
    "text.parse_math": False,  # a label called "$" is a label
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
}


_DECIMALS = re.compile(r"\d+\.\d{3,}")


def _two_decimals(number: re.Match[str]) -> str:
    return f"{float(number.group()):.2f}"


class Canvas:
    """One chart in the making.

    Use it as ``with Canvas("name", width, height) as (canvas, axes)`` and call ``canvas.svg(alt)`` in the
    block. The style is matplotlib's own defaults plus ours, whatever a user's matplotlibrc says.

    Args:
        name: Separates the ids of this chart from those of other charts on the page.
        width: Width in points.
        height: Height in points.
    """

    def __init__(self, name: str, width: float, height: float) -> None:
        self._name = name
        self._size = (width / 72, height / 72)

    def __enter__(self) -> tuple[Canvas, Any]:
        import matplotlib
        from matplotlib.figure import Figure

        self._context = matplotlib.rc_context()
        self._context.__enter__()
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": f"privfed/{self._name}"})
        self._figure = Figure(figsize=self._size)
        return self, self._figure.add_subplot()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)

    def svg(self, alt: str) -> str:
        """Return the chart as ``<svg role="img" aria-label=...>``; call it inside the ``with`` block."""
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # The browser picks the glyphs, so those missing from matplotlib's font do not matter.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self._figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
        return tidy(buffer.getvalue(), alt)


def tidy(svg: str, alt: str) -> str:
    """Return matplotlib's SVG file as an element for an HTML page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    # Group names repeat from chart to chart and nothing refers to them.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    # Two decimals of a point are plenty, and half of the file.
    body = re.sub(r' d="[^"]*"', lambda path: _DECIMALS.sub(_two_decimals, path.group()), body)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    box = re.search(r'viewBox="([^"]*)"', body[: body.index(">")])
    view_box = box.group(1) if box else "0 0 100 100"
    opening = f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="{view_box}">'
    return re.sub(r"\n\s*", "\n", opening + body[body.index(">") + 1 :]).strip()
