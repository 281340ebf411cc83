"""Reconstructions beside their originals as HTML: the page of one audit, and the part that the page of a grid shares.

The page holds training texts, so it is a file of its own beside ``audit.json`` and no part of the run's report.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from privfed.files import write_atomic
from privfed.report.page import VIEW_NAMES, VIEW_READERS

FILE = "gallery.html"
_ENDS = ".,;:!?()[]{}'\"`"


def write_gallery(run: str, views: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write the page: one file that loads nothing.

    Args:
        run: What the run is called.
        views: What :func:`privfed_audits.gallery.gallery` found, by view.
        path: The file.
    """
    write_atomic(path, render(run, views).encode("utf-8", errors="replace"))


def render(run: str, views: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page as HTML; equal results give equal bytes."""
    report = (files("privfed.report") / "templates" / "report.css").read_text(encoding="utf-8")
    return (
        environment({"gallery.html.j2": _text("gallery.html.j2")})
        .get_template("gallery.html.j2")
        .render(
            name=run,
            views=views,
            titles=VIEW_NAMES,
            readers=VIEW_READERS,
            percent=lambda share: f"{share:.0%}",
            style=Markup(report + beside_style()),  # ours; all else is escaped by the template
        )
    )


def environment(templates: Mapping[str, str]) -> jinja2.Environment:
    """Return templates that may use ``beside`` of ``beside.html.j2``; what they show is escaped.

    Args:
        templates: By name.
    """
    made = jinja2.Environment(
        loader=jinja2.DictLoader({**templates, "beside.html.j2": _text("beside.html.j2")}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals["marked"] = marked
    return made


def beside_style() -> str:
    """Return the style of ``beside``, which uses the colours of a run's report."""
    return _text("beside.css")


def marked(found: str, truth: str) -> list[tuple[str, bool]]:
    """Return the words of what was found, each with whether it is in the truth, punctuation and case aside."""
    there = {_bare(word) for word in truth.split()} - {""}
    return [(word, _bare(word) in there) for word in found.split()]


def _bare(word: str) -> str:
    return word.strip(_ENDS).casefold()


def _text(name: str) -> str:
    return (files("privfed_audits") / "templates" / name).read_text(encoding="utf-8")
