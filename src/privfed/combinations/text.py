"""The matrix of combinations for people: counts, one table of codecs, one of rules, and why the rest is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from privfed.combinations import AXES, Cell, Matrix
from privfed.errors import ConfigError

_FEW = 12
"""So many combinations are written out one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """A sentence of refusal.

    Attributes:
        sentence: What a run says.
        count: How many combinations it refuses.
        example: One of them.
        nearest: What is nearest to the example that runs, or None where nothing does.
    """

    sentence: str
    count: int
    example: Cell
    nearest: Cell | None


def selected(only: Iterable[str]) -> Matrix:
    """Return the matrix of what ``AXIS=VALUE`` words keep.

    Raises:
        ConfigError: If one is of another form, or there is no such axis or value.
    """
    kept: dict[str, list[str]] = {}
    for word in only:
        axis, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"--only {word}: expected AXIS=VALUE, such as --only rule=krum.")
        kept.setdefault(axis.strip(), []).append(value.strip())
    return Matrix(kept)


def reasons(matrix: Matrix) -> list[Reason]:
    """Return every sentence of refusal, the one of most combinations first."""
    counts: dict[str, int] = {}
    examples: dict[str, Cell] = {}
    for cell, sentence in matrix.refused.items():
        counts[sentence] = counts.get(sentence, 0) + matrix.weight(cell)
        examples.setdefault(sentence, cell)
    return [
        Reason(sentence=text, count=counts[text], example=examples[text], nearest=matrix.nearest(examples[text]))
        for text in sorted(counts, key=lambda text: -counts[text])
    ]


def lines(matrix: Matrix, *, refused: bool) -> list[str]:
    """Return the matrix as text, or with ``refused`` the sentences of refusal."""
    out = [summary(matrix), ""]
    if matrix.total <= _FEW:
        for cell in matrix.cells():
            out += _told(matrix, cell)
        return out
    if refused:
        for reason in reasons(matrix):
            out += [f"{reason.count:8,}  {reason.sentence}", f"{'':10}{_change(reason)}"]
        return out
    columns = _columns(matrix)
    out += ["Columns (privacy; secagg):"]
    out += [f"  {letter}  {name}" for letter, name in zip(_letters(columns), columns, strict=True)]
    for title, rows in _tables(matrix, columns):
        wide = max(len(label) for label in rows)
        out += ["", title, f"  {'':{wide}}" + "".join(f"{letter:>5}" for letter in _letters(columns))]
        out += [
            f"  {label:{wide}}" + "".join(f"{count or '-':>5}" for count in counts) for label, counts in rows.items()
        ]
    out += ["", "Tunings, and the rules that at least one combination of them runs with:"]
    return out + [f"  {', '.join(members)}\n    {words}" for members, words in _tunings(matrix)]


def markdown(matrix: Matrix) -> str:
    """Return the matrix as Markdown."""
    columns = _columns(matrix)
    letters = _letters(columns)
    out = [summary(matrix), "", "| column | privacy; secure aggregation |", "|---|---|"]
    out += [f"| {letter} | {name} |" for letter, name in zip(letters, columns, strict=True)]
    for title, rows in _tables(matrix, columns):
        out += ["", title, "", "| | " + " | ".join(letters) + " |", "|---" * (len(letters) + 1) + "|"]
        out += [f"| `{label}` | " + " | ".join(str(n or "-") for n in counts) + " |" for label, counts in rows.items()]
    out += ["", "| tunings | rules that at least one combination of them runs with |", "|---|---|"]
    out += [f"| {', '.join(f'`{name}`' for name in members)} | {words} |" for members, words in _tunings(matrix)]
    return "\n".join(out) + "\n"


def markdown_refused(matrix: Matrix) -> str:
    """Return the sentences of refusal as Markdown."""
    out = ["| combinations | what a run says | the nearest that runs, from one of them |", "|---|---|---|"]
    out += [f"| {each.count:,} | {each.sentence} | {_change(each)} |" for each in reasons(matrix)]
    return "\n".join(out) + "\n"


def record(matrix: Matrix) -> dict[str, Any]:
    """Return the matrix as JSON values."""
    runs: dict[Cell, list[str]] = {}
    for cell in matrix.cells():
        if cell not in matrix.refused:
            runs.setdefault(cell[1:], []).append(cell[0])
    return {
        "total": matrix.total,
        "allowed": matrix.allowed_total,
        "refused": matrix.total - matrix.allowed_total,
        "axes": matrix.labels,
        "tuning_classes": matrix.tunings,
        "runs": [
            {**dict(zip(AXES[1:], rest, strict=True)), "tunings": [m for name in names for m in matrix.tunings[name]]}
            for rest, names in runs.items()
        ],
        "reasons": [
            {
                "sentence": reason.sentence,
                "combinations": reason.count,
                "example": dict(zip(AXES, reason.example, strict=True)),
                "nearest": dict(zip(AXES, reason.nearest, strict=True)) if reason.nearest else None,
            }
            for reason in reasons(matrix)
        ],
    }


def summary(matrix: Matrix) -> str:
    """Return the counts in a sentence."""
    sizes = " x ".join(f"{len(matrix.labels[axis])} {axis}" for axis in AXES)
    allowed = matrix.allowed_total
    return f"{matrix.total:,} combinations ({sizes}): {allowed:,} run, {matrix.total - allowed:,} are refused."


def _told(matrix: Matrix, cell: Cell) -> list[str]:
    """Return one combination (of a class of tunings) and its verdict."""
    members = ", ".join(matrix.tunings[cell[0]])
    head = " | ".join([members, *cell[1:]])
    sentence = matrix.refused.get(cell)
    if sentence is None:
        return [f"{head}: runs"]
    reason = Reason(sentence=sentence, count=1, example=cell, nearest=matrix.nearest(cell))
    return [f"{head}: refused", f"  {sentence}", f"  {_change(reason)}"]


def _change(reason: Reason) -> str:
    """Return what the nearest combination that runs has in place of what."""
    if reason.nearest is None:
        return "nothing near runs"
    pairs = zip(AXES, reason.example, reason.nearest, strict=True)
    return "; ".join(f"{axis}: {old} -> {new}" for axis, old, new in pairs if old != new)


def _letters(columns: Collection[str]) -> list[str]:
    return [chr(ord("A") + number) for number in range(len(columns))]


def _columns(matrix: Matrix) -> dict[str, list[tuple[str, str]]]:
    """Return the pairs of privacy and secagg that allow anything, those that allow the same as one column."""
    allowing: dict[tuple[str, str], set[Cell]] = {}
    for tuning, codec, privacy, rule, secagg in matrix.cells():
        if (tuning, codec, privacy, rule, secagg) not in matrix.refused:
            allowing.setdefault((privacy, secagg), set()).add((tuning, codec, rule))
    groups: dict[frozenset[Cell], list[tuple[str, str]]] = {}
    for pair, cells in allowing.items():
        groups.setdefault(frozenset(cells), []).append(pair)
    return {" / ".join(f"{privacy}; {secagg}" for privacy, secagg in pairs): pairs for pairs in groups.values()}


def _tables(matrix: Matrix, columns: dict[str, list[tuple[str, str]]]) -> list[tuple[str, dict[str, list[int]]]]:
    """Return (title, counts by row and column) of codecs and of rules."""
    return [
        (
            f"Codecs: with how many of the {len(matrix.labels['rule'])} rules each runs (with some tuning)",
            _counts(matrix, columns, 1, lambda cell: cell[3]),
        ),
        (
            f"Rules: with how many of the {len(matrix.labels['codec'])} codecs each runs (with some tuning)",
            _counts(matrix, columns, 3, lambda cell: cell[1]),
        ),
    ]


def _counts(
    matrix: Matrix, columns: dict[str, list[tuple[str, str]]], row: int, counted: Callable[[Cell], str]
) -> dict[str, list[int]]:
    found: dict[tuple[str, str, str], set[str]] = {}
    for cell in matrix.cells():
        if cell not in matrix.refused:
            found.setdefault((cell[row], cell[2], cell[4]), set()).add(counted(cell))
    return {
        label: [len(found.get((label, *pairs[0]), ())) for pairs in columns.values()]
        for label in matrix.labels[AXES[row]]
    }


def _tunings(matrix: Matrix) -> list[tuple[list[str], str]]:
    """Return the members of each class, and the rules that some combination of them runs with."""
    rules: dict[str, set[str]] = {name: set() for name in matrix.tunings}
    for cell in matrix.cells():
        if cell not in matrix.refused:
            rules[cell[0]].add(cell[3])
    found = []
    for name, members in matrix.tunings.items():
        running = [rule for rule in matrix.labels["rule"] if rule in rules[name]]
        everything = len(running) == len(matrix.labels["rule"])
        found.append((members, "all" if everything else ", ".join(running) or "none"))
    return found
