"""Check the links of README, docs and notebooks: every file and every heading that they name is there.

    python docs/links.py              # exit code 1 if a link of this repository leads nowhere
    python docs/links.py --external   # list the links that lead elsewhere; none is fetched

A heading's anchor has to be right in both places where a page is read: on the site that mkdocs builds, and in the
repository, where other characters are dropped. Pages of ``docs/`` may only link to pages of ``docs/``, for the site has
no others.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from markdown.extensions.toc import slugify  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(\s*<?(?P<target>[^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
ELSEWHERE = re.compile(r"^[a-z][a-z+.-]*:", re.IGNORECASE)


def pages(root: Path) -> list[Path]:
    """Return what is checked."""
    patterns = ("*.md", "docs/*.md", "changelog.d/*.md", "notebooks/*.ipynb")
    return [path for pattern in patterns for path in sorted(root.glob(pattern))]


def text_of(path: Path) -> str:
    """Return a page's Markdown without code blocks; of a notebook that of its text cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return FENCE.sub("", text)


def links(path: Path) -> Iterator[str]:
    """Yield the targets of a page's links and pictures."""
    for found in LINK.finditer(CODE.sub("", text_of(path))):
        yield found["target"]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings that are the same on the site and in the repository."""
    seen: dict[str, int] = {}
    both = set()
    for found in HEADING.finditer(text_of(path)):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", found[1]).replace("`", "").replace("*", "")
        here = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        site = slugify(title, "-")
        count = seen.get(here, 0)
        seen[here] = count + 1
        if count == 0 and here == site:
            both.add(here)
    return both


def problem(page: Path, target: str, root: Path) -> str | None:
    """Return what is wrong with a link, or None."""
    name, _, anchor = target.partition("#")
    file = page if not name else (page.parent / name).resolve()
    if not file.exists():
        return f"there is no {name}"
    if root not in file.parents and file != root:
        return "it leads out of the repository"
    if page.parent == root / "docs" and file.parent != page.parent:
        return "a page of the site can only link to pages of the site"
    if anchor and file.suffix == ".md" and anchor not in anchors(file):
        return f"{file.name} has no heading #{anchor}, or one that is called otherwise on the site"
    return None


def check(root: Path) -> list[str]:
    """Return a sentence for every link that leads nowhere."""
    return [
        f"{page.relative_to(root)}: ({target}) {wrong}."
        for page in pages(root)
        for target in links(page)
        if not ELSEWHERE.match(target) and (wrong := problem(page, target, root))
    ]


def main() -> None:
    """Check, or list the links that lead elsewhere."""
    if "--external" in sys.argv[1:]:
        outside = {target for page in pages(ROOT) for target in links(page) if ELSEWHERE.match(target)}
        print("\n".join(sorted(outside)))
        return
    found = check(ROOT)
    print("\n".join(found) or f"Links of {len(pages(ROOT))} pages lead somewhere.")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
