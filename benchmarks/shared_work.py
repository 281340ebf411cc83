"""What the benchmarks that train many cells share: work on the frozen model, files of data, finished rows, intervals.

A cell is one run of ``privfed train``. What does not depend on the cell (the parsed data, the tokens, the states of
frozen blocks, the features of the frozen model) is made once and handed out again, bit for bit.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privfed_audits.statistics import t_half_width

if TYPE_CHECKING:
    from privfed.federation.shared import SharedWork

_MOST_KEPT = 16
_shared: list[SharedWork] = []


def read_rows(store: Path) -> list[dict[str, Any]]:
    """Return the finished cells of a store."""
    return [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []


def append_row(store: Path, row: dict[str, Any]) -> None:
    """Add a finished cell to a store; what is there stays whatever happens next."""
    with store.open("a") as file:
        file.write(json.dumps(row) + "\n")


def find_file(folder: Path, name: str) -> Path:
    """Return the file or folder called ``name`` in or below ``folder``.

    Raises:
        SystemExit: If it is not there.
    """
    found = sorted(folder.rglob(name))
    if not found:
        raise SystemExit(f"There is no {name} in or below {folder}: pass the folder that holds it as --data.")
    return found[0]


def subset(path: Path, rows: int, folder: Path) -> Path:
    """Return a file in ``folder`` of ``rows`` rows of ``path``, those with the least SHA-256; ``path`` for 0."""
    if not rows:
        return path
    out = folder / f"{rows}-{path.name}"
    if not out.exists():
        lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
        lines.sort(key=lambda line: hashlib.sha256(line).digest())
        folder.mkdir(parents=True, exist_ok=True)
        out.write_bytes(gzip.compress(b"".join(lines[:rows]), mtime=0))
    return out


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Return mean ± half of the 95 % t-interval over seeds, with the number of seeds in brackets."""
    mean = f"{statistics.mean(values):.{digits}f}"
    half = t_half_width(values)
    return f"{mean} (1)" if half is None else f"{mean} ± {half:.{digits}f} ({len(values)})"


def share_frozen_work(folder: str) -> None:
    """Let the cells of this process, and of others with the same folder, share what does not depend on them.

    They are handed :func:`frozen_work`.
    """
    import torch

    from privfed import run
    from privfed.federation.shared import SharedWork

    torch.set_num_threads(1)
    _shared.append(SharedWork(Path(folder), keep=_MOST_KEPT))
    vars(run)["write_report"] = lambda folder: folder  # a page that nobody would open


def frozen_work() -> SharedWork:
    """Return what the cells of this process share; nothing before :func:`share_frozen_work`."""
    from privfed.federation.shared import NOTHING

    return _shared[-1] if _shared else NOTHING
