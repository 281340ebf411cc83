"""Duplicate texts: exact ones are dropped, near ones are found so that no split parts them.

Two texts are exact duplicates where they agree up to case and white space, and near-duplicates where the
Jaccard index of their sets of word 3-shingles is at least 0.8.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Sequence

from privfed.data.labels import R
from privfed.data.rows import counted
from privfed.errors import DataError

SHINGLE_WORDS = 3
NEAR_JACCARD = 0.8

# A pair of Jaccard index s shares a bucket with probability 1 - (1 - s^3)^20: above 1 - 10^-6 at s = 0.8.
# Buckets only propose: every pair is then compared exactly, so wide buckets cost time and never correctness.
BANDS = 20
BAND_ROWS = 3
_PERMUTATIONS = BANDS * BAND_ROWS
_SEED = 1

# Sets of up to this many shingles reach 0.8 only by being equal (3 of 4 is 0.75): no search is needed.
_EQUAL_ONLY = 3


def normalise(text: str) -> str:
    """Return ``text`` without regard to case and white space."""
    return " ".join(text.split()).casefold()


def drop_exact(rows: R, keys: Sequence[str], noun: str) -> tuple[R, list[str]]:
    """Return ``rows`` with the first of each set of exact duplicates, and notes.

    Args:
        rows: The rows.
        keys: What equal rows have in common, one a row: normalised text, or an image's hash.
        noun: What notes call a row.
    """
    labels, first, conflicts = rows.labels, dict[str, int](), 0
    for i, key in enumerate(keys):
        kept = first.setdefault(key, i)
        conflicts += labels is not None and labels[kept] != labels[i]
    dropped = len(rows) - len(first)
    if not dropped:
        return rows, []
    note = f"{counted(dropped, f'duplicate {noun}')} dropped"
    if conflicts:
        note += f", {conflicts} of them labelled otherwise than the first, which is kept"
    return rows.take(list(first.values())), [note]


def drop_shared(
    train: R, keys: Sequence[str], held_out: Collection[str], noun: str, origins: tuple[str, str]
) -> tuple[R, list[str]]:
    """Return the rows of ``train`` that are no exact duplicate of one in the test split, and notes.

    Args:
        train: The rows.
        keys: As for :func:`drop_exact`.
        held_out: The keys of the test split.
        noun: What messages call a row.
        origins: What messages call the training rows and the test rows.

    Raises:
        DataError: If none is left.
    """
    kept = [i for i, key in enumerate(keys) if key not in held_out]
    dropped = len(train) - len(kept)
    if not kept:
        raise DataError(
            f"Every training {noun} of {origins[0]} repeats one of {origins[1]}, expected others to train on: "
            "check [data] path and test_path."
        )
    if not dropped:
        return train, []
    return train.take(kept), [f"{counted(dropped, f'training {noun}')} dropped for repeating a test {noun}"]


def shingles(text: str) -> frozenset[str]:
    """Return the runs of three words in ``text``; a shorter text is one shingle."""
    words = text.split()
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(" ".join(words[i : i + SHINGLE_WORDS]) for i in range(count))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return the size of the intersection over that of the union."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def near_groups(texts: Sequence[str]) -> list[list[int]]:
    """Return the connected groups of near-duplicates among normalised ``texts``; most have one member.

    Texts are first joined by equal shingle sets; sets of more than three shingles are then searched with
    MinHash and locality-sensitive hashing under a fixed seed, and each proposed pair is compared exactly.
    """
    parents = list(range(len(texts)))
    heads: dict[frozenset[str], int] = {}
    for i, text in enumerate(texts):
        parents[i] = heads.setdefault(shingles(text), i)
    searched = {i: key for key, i in heads.items() if len(key) > _EQUAL_ONLY}
    for a, b in _candidates(searched):
        root_a, root_b = _root(parents, a), _root(parents, b)
        if root_a != root_b and jaccard(searched[a], searched[b]) >= NEAR_JACCARD:
            parents[max(root_a, root_b)] = min(root_a, root_b)
    groups: dict[int, list[int]] = {}
    for i in range(len(texts)):
        groups.setdefault(_root(parents, i), []).append(i)
    return list(groups.values())


def _candidates(sets: dict[int, frozenset[str]]) -> Iterator[tuple[int, int]]:
    """Yield pairs of keys whose sets are probably near each other."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=_PERMUTATIONS, params=(BANDS, BAND_ROWS))
    blank = MinHash(num_perm=_PERMUTATIONS, seed=_SEED, hashfunc=zlib.crc32)
    for key, members in sets.items():
        sketch = blank.copy()  # shares the permutations, whose drawing would cost more than the sketch
        sketch.update_batch([member.encode("utf-8", "surrogatepass") for member in members])
        for other in index.query(sketch):
            yield other, key
        index.insert(key, sketch, check_duplication=False)


def _root(parents: list[int], i: int) -> int:
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return i
