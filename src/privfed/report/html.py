"""The HTML report of a run: one file that opens anywhere, loads nothing, and repeats to the byte."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from privfed.files import write_atomic
from privfed.report.load import RunView, load_run
from privfed.report.page import page

TEMPLATES = ("report.html.j2", "parts.html.j2", "details.html.j2")


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder, finished or not.

    Args:
        run_folder: What ``privfed train`` wrote.

    Returns:
        The path of the report.

    Raises:
        ConfigError: If this is not a run folder, or one of its files is garbled.
    """
    target = run_folder / "report.html"
    write_atomic(target, render(load_run(run_folder)).encode("utf-8", errors="replace"))
    return target


def render(view: RunView) -> str:
    """Return the report of a run as HTML; equal runs give equal bytes."""
    folder = files("privfed.report") / "templates"
    sources = {name: (folder / name).read_text(encoding="utf-8") for name in TEMPLATES}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(sources),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # The style and the charts are ours and already escaped; everything else is escaped by the template.
    style = Markup((folder / "report.css").read_text(encoding="utf-8"))
    environment.filters["svg"] = Markup
    return environment.get_template("report.html.j2").render(style=style, **page(view))
