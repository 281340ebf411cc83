"""The page in a real browser, where one is installed: it draws, filters, fits the window and asks for nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from privfed_audits.grids.page.write import render
from privfed_audits.grids.tables import tables

_path = Path(__file__).parents[2] / "privfed" / "report" / "test_browser.py"
_spec = importlib.util.spec_from_file_location("privfed_report_browser", _path)
assert _spec is not None and _spec.loader is not None
browser = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = browser
_spec.loader.exec_module(browser)

pytestmark = pytest.mark.skipif(browser.BROWSER is None, reason="no Chromium or Chrome on the PATH")
# what a filter leaves is counted by the page itself; clicks are those of a person
CLICKS = """<script>addEventListener("load", () => {
  const seen = {start: count()};
  function count() {
    const plot = document.getElementById("plot-utility");
    return [document.body.dataset.shown, plot.data.filter(t => t.visible).length,
      [...document.querySelectorAll('[data-kind="row"]')].filter(r => !r.hidden).length,
      document.getElementById("setting").value];
  }
  const click = value => document.querySelector(`.filters input[value="${value}"]`).click();
  click("LoRA"); seen.tuning = count();
  click("8 bit"); seen.codec = count();
  click("aggregate");
  seen.views = new Set(document.getElementById("plot-leakage").data.filter(t => t.visible).map(t => t.meta?.view)).size;
  document.getElementById("all").click(); seen.all = count();
  const drawn = [...document.querySelectorAll(".plot")].map(p => p.querySelectorAll(".main-svg").length > 0);
  seen.drawn = drawn.every(Boolean) && drawn.length;
  seen.requests = performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"));
  document.title = JSON.stringify(seen);
});</script></body>"""
WIDTH = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main > *, .card, .plot, .chip, h1, h2")].filter(
    e => e.getBoundingClientRect().right > innerWidth + 1);
  document.body.dataset.probe = JSON.stringify([innerWidth, document.documentElement.scrollWidth, wide.length]);
});</script></body>"""


@pytest.fixture(scope="module")
def page(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of a grid of 36 cells."""
    grid = made.grid(seeds=[1])
    found = made.read(made.write(tmp_path_factory.mktemp("browsed") / "grid", grid), grid)
    return render(found, tables(found))


def browse(tmp_path: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a fresh profile; a page of megabytes takes its time on a busy machine."""
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(browser.BROWSER), *browser.FLAGS, profile, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)


def test_it_draws_filters_and_asks_for_nothing(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", CLICKS), encoding="utf-8")
    log = tmp_path / "net.json"
    done = browse(tmp_path, path, "--dump-dom", f"--log-net-log={log}")
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found is not None, done.stderr[-2000:]
    seen = json.loads(found.group(1).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    cells, traces, rows, chosen = seen["start"]
    assert (cells, traces) == ("36", 12) and chosen.startswith("LoRA")
    assert seen["tuning"][:2] == ["27", 9] and seen["tuning"][2] < rows and not seen["tuning"][3].startswith("LoRA")
    assert seen["codec"][:2] == ["18", 6] and "8 bit" not in seen["codec"][3]
    assert seen["views"] == 2  # the trained model's, and the line that belongs to none
    assert seen["all"][:3] == seen["start"][:3]
    assert seen["drawn"] == 6 and seen["requests"] == []
    assert re.findall(r'"url":"(https?://[^"]*page[^"]*)"', log.read_text()) == []


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_scrolls_sideways(page: str, tmp_path: Path, width: int) -> None:
    inner = tmp_path / "inner.html"
    inner.write_text(page.replace("</body>", WIDTH), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<!doctype html><iframe id="f" src="inner.html" width="{width}" height="800" frameborder="0"></iframe>'
        '<script>addEventListener("load", () => { document.title ='
        ' document.getElementById("f").contentDocument.body.dataset.probe; });</script>'
    )
    done = browse(tmp_path, frame, "--dump-dom", "--allow-file-access-from-files", "--window-size=1500,900")
    found = re.search(r"<title>\[(\d+),(\d+),(\d+)\]</title>", done.stdout)
    assert found, done.stdout[-2000:]
    inner_width, scroll_width, sticking_out = map(int, found.groups())
    assert inner_width == width and scroll_width <= width and sticking_out == 0
