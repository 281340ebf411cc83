"""The matrix of combinations: exact for every tuning, every refusal with a reason, and something near that runs."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from privfed.cli import main
from privfed.combinations import AXES, CLIENTS, Cell, Matrix, choices, refusal, tables_of
from privfed.combinations.text import lines, markdown, reasons, record, selected
from privfed.compression import CODECS
from privfed.config import parse_config
from privfed.errors import ConfigError, UnknownNameError
from privfed.privacy.mechanisms import MECHANISMS
from privfed.rules import RULES, NoOptions, Rule
from privfed.tuning import TUNINGS

# what names each axis in a sentence of refusal
SAID = {
    "tuning": ("tuning.name", "model.task"),
    "codec": ("compression.",),
    "privacy": ("privacy.", "client level", "per client"),
    "rule": ("server.aggregation",),
    "secagg": ("secagg.name",),
}


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    """All combinations."""
    return Matrix()


def _random_cells(matrix: Matrix, count: int, seed: int) -> Iterator[Cell]:
    draw = random.Random(seed)
    for _ in range(count):
        yield tuple(draw.choice(matrix.labels[axis]) for axis in AXES)


def test_every_plugin_is_on_its_axis() -> None:
    found = {axis: [choice.label for choice in of_axis] for axis, of_axis in choices().items()}
    assert set(found["tuning"]) == set(TUNINGS.names())
    assert set(found["rule"]) == set(RULES.names())
    assert {label.split(", ")[0] for label in found["codec"]} == set(CODECS.names())
    central = {label.rpartition(", ")[2] for label in found["privacy"] if label.startswith("client, central")}
    assert central == set(MECHANISMS.names())
    assert {label.split(", ")[0] for label in found["privacy"]} == {"none", "example", "client"}
    assert [found[axis][0] for axis in ("tuning", "codec", "rule")] == ["ffa_lora", "identity", "fedavg"]
    assert all(len(set(labels)) == len(labels) for labels in found.values())


@pytest.mark.parametrize("seed", range(4))
def test_a_tuning_stands_for_its_class(matrix: Matrix, seed: int) -> None:
    """The factorisation is exact: each random combination, asked by itself, is refused as its class is."""
    refused = 0
    for cell in _random_cells(matrix, 500, seed):
        asked = refusal(matrix.tables(cell))
        told = matrix.refused.get((matrix.classes[cell[0]], *cell[1:]))
        refused += asked is not None
        if told is None or asked is None:
            assert asked is told, (cell, asked, told)
        else:
            assert asked.replace(f'"{cell[0]}"', "T").replace(f"'{cell[0]}'", "T") == told.replace(
                f'"{matrix.classes[cell[0]]}"', "T"
            ).replace(f"'{matrix.classes[cell[0]]}'", "T")
    assert 100 < refused < 500


def test_a_tuning_stands_for_its_class_where_rules_tell_tunings_apart(matrix: Matrix) -> None:
    for tuning, rule in itertools.product(matrix.labels["tuning"], matrix.labels["rule"]):
        cell = (tuning, "identity", "none", rule, "none")
        told = (matrix.classes[tuning], *cell[1:]) in matrix.refused
        assert (refusal(matrix.tables(cell)) is not None) == told, cell


def test_what_is_counted_is_what_there_is(matrix: Matrix) -> None:
    sizes = [len(matrix.labels[axis]) for axis in AXES]
    assert matrix.total == sizes[0] * sizes[1] * sizes[2] * sizes[3] * sizes[4]
    assert sum(matrix.weight(cell) for cell in matrix.cells()) == matrix.total
    assert 0 < matrix.allowed_total < matrix.total
    small = Matrix({"tuning": ["lora", "bitfit"], "codec": ["identity"], "privacy": ["example", "none"]})
    asked = itertools.product(*(small.labels[axis] for axis in AXES))
    assert small.allowed_total == sum(refusal(small.tables(cell)) is None for cell in asked)


def test_every_refusal_names_both_sides(matrix: Matrix) -> None:
    """But for a value with which nothing runs: there is no other side to it."""
    running = [{cell[n] for cell in matrix.cells() if cell not in matrix.refused} for n in range(len(AXES))]
    for cell, sentence in matrix.refused.items():
        named = [(*SAID[axis], repr(label.split(", ")[0])) for axis, label in zip(AXES, cell, strict=True)]
        sides = [axis for axis, words in zip(AXES, named, strict=True) if any(word in sentence for word in words)]
        alone = [axis for n, axis in enumerate(AXES) if cell[n] not in running[n]]
        assert len(sides) >= 2 or (sides and sides[0] in alone), (cell, sentence)
        assert sentence.endswith(".")
        assert "\n" not in sentence


def test_the_nearest_runs_and_nothing_nearer_does(matrix: Matrix) -> None:
    draw = random.Random(1)
    everything = [{choice.label for choice in matrix.axes[axis]} for axis in AXES]
    for cell in draw.sample(sorted(matrix.refused), 25):
        found = matrix.nearest(cell)
        assert found is not None
        assert refusal(matrix.tables(found)) is None
        distance = sum(a != b for a, b in zip(cell, found, strict=True))
        assert distance > 0
        if distance > 1:  # then no single change does
            for n in range(len(AXES)):
                for other in everything[n]:
                    assert refusal(matrix.tables((*cell[:n], other, *cell[n + 1 :]))) is not None


def test_privacy_is_the_last_that_is_given_up(matrix: Matrix) -> None:
    cell = ("ffa_lora", "identity", "client, central, gaussian", "krum", "masked")
    assert matrix.nearest(cell) == ("ffa_lora", "identity", "client, central, gaussian", "fedavg", "masked")
    assert matrix.nearest(("xlora", *cell[1:3], "fedavg", "masked")) == ("ffa_lora", *cell[1:3], "fedavg", "masked")


def test_a_new_plugin_is_a_new_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fading(Rule):
        takes = frozenset({"bitfit"})

    monkeypatch.setitem(RULES._entries, "fading", Fading)
    small = Matrix({"rule": ["fading"], "codec": ["identity"], "privacy": ["none"], "secagg": ["none"]})
    assert [cell[0] for cell in small.cells() if cell not in small.refused] == ["bitfit"]
    assert small.allowed_total == 1
    assert Fading.config is NoOptions


def test_the_tables_are_a_run(matrix: Matrix) -> None:
    cell = ("lora", "stochastic_quantizer", "example, local, gaussian", "rolora", "masked")
    config = parse_config(matrix.tables(cell), where="x")
    assert (config.tuning.name, config.compression.name, config.server.rule) == cell[:1] + cell[1:2] + cell[3:4]
    assert (config.privacy.unit, config.privacy.placement, config.secagg.name) == ("example", "local", "masked")
    assert config.server.cohort_size == CLIENTS
    assert tables_of([])["server"]["cohort_size"] == CLIENTS


def test_words_keep_what_they_fit() -> None:
    kept = selected(["privacy=client", "codec=top_k", "rule=krum", "rule=median"])
    assert all(label.startswith("client, ") for label in kept.labels["privacy"])
    assert {label.split(", ")[0] for label in kept.labels["codec"]} == {"top_k"}
    assert kept.labels["rule"] == ["krum", "median"]
    with pytest.raises(UnknownNameError, match="Did you mean 'rule'"):
        selected(["rules=krum"])
    with pytest.raises(UnknownNameError, match="Did you mean 'krum'"):
        selected(["rule=crum"])
    with pytest.raises(ConfigError, match="AXIS=VALUE"):
        selected(["krum"])


def test_the_text_says_what_the_matrix_says(matrix: Matrix) -> None:
    shown = "\n".join(lines(matrix, refused=False))
    assert f"{matrix.total:,} combinations" in shown
    assert f"{matrix.allowed_total:,} run" in shown
    for axis in ("codec", "rule"):
        assert all(f"\n  {label} " in shown for label in matrix.labels[axis])
        assert all(f"| `{label}` |" in markdown(matrix) for label in matrix.labels[axis])
    assert sum(reason.count for reason in reasons(matrix)) == matrix.total - matrix.allowed_total
    told = "\n".join(lines(matrix, refused=True))
    assert all(reason.sentence in told for reason in reasons(matrix))
    found = record(matrix)
    assert sum(len(each["tunings"]) for each in found["runs"]) == found["allowed"] == matrix.allowed_total
    json.dumps(found, allow_nan=False)


def test_one_combination_is_told_with_its_reason_and_the_nearest() -> None:
    axes = ["tuning=lora", "codec=identity", "privacy=none", "rule=krum"]
    shown = "\n".join(lines(selected([*axes, "secagg=masked"]), refused=False))
    assert "refused" in shown
    assert "rule: krum -> fedavg" in shown
    assert "runs" in "\n".join(lines(selected([*axes, "secagg=none"]), refused=False))


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys; from privfed.combinations import Matrix; Matrix({'codec': ['identity']}).refused; "
        "sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command() -> None:
    run = CliRunner().invoke
    only = ["ls", "combinations", "--only", "rule=krum", "--only", "tuning=lora", "--only", "codec=identity"]
    shown = run(main, only)
    assert shown.exit_code == 0
    assert "run," in shown.output
    assert "server.aggregation = 'krum'" in run(main, [*only, "--refused"]).output
    assert json.loads(run(main, [*only, "--json"]).output)["axes"]["rule"] == ["krum"]
    for arguments, words in (
        (["ls", "rules", "--refused"], "belong to `privfed ls combinations`"),
        (["ls", "combinations", "--only", "colour=red"], "Unknown axis 'colour'"),
    ):
        refused = run(main, arguments)
        assert refused.exit_code == 2
        assert words in refused.output
