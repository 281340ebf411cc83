"""The report in a real browser, where one is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")


def browse(tmp_path: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a fresh profile and return what the browser printed."""
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    return subprocess.run(
        [str(BROWSER), *FLAGS, profile, *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


# Only the test's copy of the page may run a script: it writes the page's true width into the document.
PROBE = """<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const wide = [...document.querySelectorAll("main > *, .card, .big, h1, h2")].filter(
    e => e.getBoundingClientRect().right > innerWidth + 1);
  const page = document.documentElement;
  document.body.dataset.probe = JSON.stringify([innerWidth, page.scrollWidth, wide.length]);
});</script></body>"""


@pytest.mark.parametrize("kind", ["local", "unfinished"])
def test_page_loads_without_console_errors(runs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    done = browse(tmp_path, runs[kind] / "report.html", "--dump-dom")
    assert "What was promised?" in done.stdout and done.stdout.rstrip().endswith("</html>")
    assert done.stdout.count("</svg>") >= 3
    assert "CONSOLE" not in done.stderr, done.stderr


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_scrolls_sideways(runs: dict[str, Path], tmp_path: Path, width: int) -> None:
    text = (runs["central"] / "report.html").read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    # Headless windows have a least width, so the phone is a frame of the right width.
    inner = tmp_path / "inner.html"
    inner.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<!doctype html><iframe id="f" src="inner.html" width="{width}" height="800" frameborder="0">'
        "</iframe>"
        '<script>addEventListener("load", () => { document.title ='
        ' document.getElementById("f").contentDocument.body.dataset.probe; });</script>'
    )
    done = browse(tmp_path, frame, "--dump-dom", "--allow-file-access-from-files", "--window-size=1500,900")
    found = re.search(r"<title>\[(\d+),(\d+),(\d+)\]</title>", done.stdout)
    assert found, done.stdout[-2000:]
    inner_width, scroll_width, sticking_out = map(int, found.groups())
    assert inner_width == width and scroll_width <= width and sticking_out == 0
