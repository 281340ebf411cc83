"""Every combination with secure aggregation that the matrix allows runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from combination_cells import CODECS, Bench, failures, smaller


@pytest.fixture(scope="module")
def bench(tiny_bert: Path, text_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """What cells share."""
    return Bench(smaller(tiny_bert, tmp_path_factory.mktemp("cells") / "bert"), text_csv)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_every_allowed_combination_runs(codec: str, bench: Bench, tmp_path: Path) -> None:
    found = failures(codec, "masked", bench, tmp_path)
    assert not found, f"{len(found)} failures:\n" + "\n".join(found[:20])
