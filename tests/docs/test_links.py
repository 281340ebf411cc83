"""The check of links finds what leads nowhere, and this repository's links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("markdown")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def links() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_links", ROOT / "docs" / "links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# A page\n\n## Its `own` part\n\n## 2 + 2\n", encoding="utf-8")
    (tmp_path / "LICENSE").write_text("free", encoding="utf-8")
    return tmp_path


def test_every_link_of_this_repository_leads_somewhere(links: ModuleType) -> None:
    assert len(links.pages(ROOT)) > 30
    assert links.check(ROOT) == []


def test_good_links_pass(links: ModuleType, made: Path) -> None:
    text = "[a](docs/page.md) [b](docs/page.md#its-own-part) [c](LICENSE) ![d](https://example.org/x.png) [e](#top)\n"
    (made / "README.md").write_text(f"# Top\n\n{text}\n`[no](link)`\n\n```\n[none](either)\n```\n", encoding="utf-8")
    assert links.check(made) == []
    assert "https://example.org/x.png" in set(links.links(made / "README.md"))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("docs/pages.md", "there is no docs/pages.md"),
        ("docs/page.md#its-part", "has no heading #its-part"),
        ("docs/page.md#2--2", "called otherwise on the site"),  # the site says #2-2
        ("#nowhere", "has no heading #nowhere"),
    ],
)
def test_links_that_lead_nowhere_are_named(links: ModuleType, made: Path, target: str, said: str) -> None:
    (made / "README.md").write_text(f"# Top\n\n[x]({target})\n", encoding="utf-8")
    (found,) = links.check(made)
    assert found.startswith(f"README.md: ({target}) ") and said in found


def test_a_page_of_the_site_cannot_link_out_of_it(links: ModuleType, made: Path) -> None:
    (made / "docs" / "other.md").write_text("[licence](../LICENSE)\n", encoding="utf-8")
    assert links.check(made) == ["docs/other.md: (../LICENSE) a page of the site can only link to pages of the site."]


def test_text_cells_of_notebooks_are_read(links: ModuleType, made: Path) -> None:
    (made / "notebooks").mkdir()
    cells = [{"cell_type": "markdown", "source": ["[x](../docs/gone.md)"]}, {"cell_type": "code", "source": "[y](z)"}]
    (made / "notebooks" / "01.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert links.check(made) == ["notebooks/01.ipynb: (../docs/gone.md) there is no ../docs/gone.md."]
