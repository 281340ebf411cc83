"""The held-out split of a source that brings none: fixed by the rows' content."""

from __future__ import annotations

import hashlib

from privfed.data.duplicates import near_groups, normalise
from privfed.data.rows import Rows, counted
from privfed.errors import DataError


def hold_out(rows: Rows, fraction: float, *, origin: str) -> tuple[Rows, Rows, list[str]]:
    """Return training rows, test rows and notes; near-duplicates lie on one side together.

    A group of near-duplicates goes to the test side where the SHA-256 of its smallest normalised text, read
    as a number in [0, 1), is below ``fraction``: the split depends neither on the order of the rows nor on a
    seed.
    A label that would have no training row keeps all of its groups in training.

    Raises:
        DataError: If one side is empty.
    """
    texts = [normalise(text) for text in rows.texts]
    groups = near_groups(texts)
    to_test = [_position(min(texts[i] for i in group)) < fraction for group in groups]
    labels = rows.labels or (0,) * len(rows)  # records without classes are all of one
    trained = {labels[i] for group, test in zip(groups, to_test, strict=True) if not test for i in group}
    train: list[int] = []
    test_rows: list[int] = []
    moved = 0
    for group, test in zip(groups, to_test, strict=True):
        test = test and all(labels[i] in trained for i in group)
        (test_rows if test else train).extend(group)
        moved += sum((_position(texts[i]) < fraction) != test for i in group) if len(group) > 1 else 0
    if not train or not test_rows:
        raise DataError(
            f"{origin}: a test_fraction of {fraction} puts {len(test_rows)} of {len(rows)} rows to the "
            "test side, expected rows on both sides: give more rows, another test_fraction, or a test_path."
        )
    note = f"{counted(moved, 'row')} moved to the other side of the split with their near-duplicates"
    notes = [note] if moved else []
    share = len(test_rows) / len(rows)
    if abs(share - fraction) > 0.5 * fraction:
        notes.append(
            f"only {len(test_rows)} of {len(rows)} rows ({share:.1%}) fell to the test side, not test_fraction = "
            f"{fraction:.0%}: were these rows split by privfed before? Give a test_path"
        )
    return rows.take(sorted(train)), rows.take(sorted(test_rows)), notes


def _position(text: str) -> float:
    """Return a number in [0, 1) that depends on ``text`` alone."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2.0**48
