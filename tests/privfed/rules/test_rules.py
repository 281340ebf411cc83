"""Rules as functions of numbers: what they compute, by hand, on factors of made-up clients.

Shape suffixes: M outputs, N inputs, R rank.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from privfed.rules import RULES, Contribution, Pair, Setting, Tensors
from privfed.rules.factors import best_factors, product
from privfed.rules.scaffold import variate_change

M, N, R = 7, 6, 2
PLAIN = Pair(a="a", b="b", weight="w", scale=2.0)
CONV = Pair(a="a2", b="b2", weight="w2", scale=0.5, transposed=True)
PAIRS = (PLAIN, CONV)
SETTING = Setting(pairs=PAIRS, seed=1, round=3)


def _tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (R, N), "b": (M, R), "w": (M, N), "a2": (R, N), "b2": (M, R), "w2": (N, M), "head": (3,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _clients(shares: tuple[float, ...] = (0.5, 0.3, 0.2)) -> list[Contribution]:
    return [Contribution(share=share, tensors=_tensors(10 + i)) for i, share in enumerate(shares)]


def _averaged(before: Tensors, clients: list[Contribution]) -> dict[str, np.ndarray]:
    mean = {name: np.sum([c.share * c.tensors[name] for c in clients], axis=0).astype(np.float32) for name in before}
    return {**mean, "w": before["w"], "w2": before["w2"]}


def _model(tensors: Tensors, pair: Pair) -> np.ndarray:
    """The weight that the layer computes with."""
    change = pair.scale * (tensors[pair.b].astype(np.float64) @ tensors[pair.a].astype(np.float64))
    return tensors[pair.weight] + (change.T if pair.transposed else change)


def _after(name: str) -> tuple[Tensors, Tensors, list[Contribution], dict[str, np.ndarray]]:
    before, clients = _tensors(1), _clients()
    averaged = _averaged(before, clients)
    rule = RULES.get(name)()
    seen = clients if rule.needs_individual else []
    changed = rule.step(before, averaged, seen, SETTING)
    assert set(changed) <= set(before)
    for tensor, value in changed.items():
        assert value.dtype == np.float32
        assert value.shape == before[tensor].shape
    return before, averaged, clients, {**averaged, **changed}


def _mean_of_models(before: Tensors, clients: list[Contribution], pair: Pair) -> np.ndarray:
    each = [c.share * _model({**c.tensors, pair.weight: before[pair.weight]}, pair) for c in clients]
    return np.asarray(np.sum(each, axis=0))


@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
def test_an_exact_rule_gives_the_average_of_the_models(name: str) -> None:
    before, averaged, clients, after = _after(name)
    for pair in PAIRS:
        wanted = _mean_of_models(before, clients, pair)
        np.testing.assert_allclose(_model(after, pair), wanted, atol=1e-5)
        assert np.abs(_model(averaged, pair) - wanted).max() > 0.1  # which averaging the factors does not


def test_fedex_keeps_the_averaged_factors_and_flora_starts_afresh() -> None:
    _, averaged, _, after = _after("fedex_lora")
    np.testing.assert_array_equal(after["a"], averaged["a"])
    before, _, _, after = _after("flora")
    assert not after["b"].any()
    assert not after["b2"].any()
    assert np.abs(after["a"]).max() <= 1 / np.sqrt(N)
    assert not np.array_equal(after["a"], before["a"])
    again = RULES.get("flora")().step(before, before, _clients(), SETTING)
    np.testing.assert_array_equal(again["a"], after["a"])  # of the seed and the round alone
    later = RULES.get("flora")().step(before, before, _clients(), Setting(pairs=PAIRS, seed=1, round=4))
    assert not np.array_equal(later["a"], after["a"])


def test_flexlora_is_the_best_cut_of_the_averaged_product() -> None:
    _, _, clients, after = _after("flexlora")
    for pair in PAIRS:
        mean = sum(c.share * product(c.tensors, pair) for c in clients)
        u, values, vt = np.linalg.svd(mean)
        wanted = (u[:, :R] * values[:R]) @ vt[:R]
        np.testing.assert_allclose(product(after, pair), wanted, atol=1e-5)
        assert np.linalg.norm(mean - wanted) > 0.1
        assert values[R] == pytest.approx(np.linalg.norm(mean - product(after, pair), 2), rel=1e-4)


def test_fedsvd_keeps_the_product_and_makes_a_orthonormal() -> None:
    _, averaged, _, after = _after("fedsvd")
    for pair in PAIRS:
        np.testing.assert_allclose(product(after, pair), product(averaged, pair), atol=1e-5)
        np.testing.assert_allclose(after[pair.a] @ after[pair.a].T, np.eye(R), atol=1e-6)
        assert np.abs(averaged[pair.a] @ averaged[pair.a].T - np.eye(R)).max() > 0.1


def test_fedsvd_of_a_zero_b_still_has_an_orthonormal_a() -> None:
    averaged = {**_tensors(1), "b": np.zeros((M, R), np.float32), "b2": np.zeros((M, R), np.float32)}
    after = RULES.get("fedsvd")().step(averaged, averaged, [], SETTING)
    np.testing.assert_allclose(after["a"] @ after["a"].T, np.eye(R), atol=1e-6)
    assert not after["b"].any()


def test_frlora_starts_as_the_same_model_with_principal_factors() -> None:
    tensors = _tensors(1)
    started = {**tensors, **RULES.get("frlora")().start(tensors, SETTING)}
    for pair in PAIRS:
        np.testing.assert_allclose(_model(started, pair), _model(tensors, pair), atol=1e-5)
        weight = tensors[pair.weight].T if pair.transposed else tensors[pair.weight]
        u, values, vt = np.linalg.svd(weight.astype(np.float64))
        wanted = (u[:, :R] * values[:R]) @ vt[:R]
        np.testing.assert_allclose(pair.scale * product(started, pair), wanted, atol=1e-5)


def test_frlora_moves_the_residual_into_the_weight() -> None:
    before, averaged, _, after = _after("frlora")
    for pair in PAIRS:
        np.testing.assert_allclose(_model(after, pair), _model(averaged, pair), atol=1e-5)
        np.testing.assert_array_equal(after[pair.a], before[pair.a])
        np.testing.assert_array_equal(after[pair.b], before[pair.b])


def test_frlora_outgrows_the_rank_of_the_adapter() -> None:
    state = _tensors(1)
    start = _model(state, PLAIN)
    rule = RULES.get("frlora")()
    for number in range(3):
        averaged = {**_averaged(state, [Contribution(share=1.0, tensors=_tensors(50 + number))])}
        state = {**averaged, **rule.step(state, averaged, [], SETTING)}
    change = np.linalg.svd(_model(state, PLAIN) - start, compute_uv=False)
    assert (change > 1e-3).sum() > R


def test_rolora_alternates_and_b_goes_first() -> None:
    rule = RULES.get("rolora")()
    assert rule.resting(1, PAIRS) == {"a", "a2"}
    assert rule.resting(2, PAIRS) == {"b", "b2"}
    assert rule.resting(3, PAIRS) == rule.resting(1, PAIRS)


def test_fedsa_keeps_b_with_the_clients() -> None:
    assert RULES.get("fedsa_lora")().personal(PAIRS) == {"b", "b2"}


@pytest.mark.parametrize(("m", "n", "s", "r"), [(9, 8, 3, 2), (9, 8, 8, 4), (5, 8, 30, 5), (3, 8, 4, 4), (8, 3, 2, 2)])
def test_factors_are_the_best_of_their_rank(m: int, n: int, s: int, r: int) -> None:
    rng = np.random.default_rng(m * n * s)
    b, a = rng.standard_normal((m, s)), rng.standard_normal((s, n))
    u, values, vt = best_factors(b, a, r)
    assert (u.shape, values.shape, vt.shape) == ((m, r), (r,), (r, n))
    wanted_u, wanted, wanted_v = np.linalg.svd(b @ a, full_matrices=False)
    cut = min(r, len(wanted))
    np.testing.assert_allclose((u * values) @ vt, (wanted_u[:, :cut] * wanted[:cut]) @ wanted_v[:cut], atol=1e-9)
    np.testing.assert_allclose(values[:cut], wanted[:cut], atol=1e-9)


def test_scaffolds_second_message_is_a_function_of_the_first() -> None:
    """Option II by the paper's own formula, and the derived one: for each client and for the mean."""
    rng = np.random.default_rng(3)
    x, c = rng.standard_normal(5), rng.standard_normal(5).astype(np.float32)
    rates = np.full(5, 0.25, np.float32)
    ys, own = rng.standard_normal((3, 5)), rng.standard_normal((3, 5))
    paper = own - c + (x - ys) / 0.25
    np.testing.assert_allclose([variate_change(c, y - x, rates) for y in ys], paper - own, atol=1e-6)
    np.testing.assert_allclose(variate_change(c, (ys - x).mean(axis=0), rates), (paper - own).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("name", RULES.names())
def test_every_rule_says_what_it_is(name: str) -> None:
    rule = RULES.get(name)()
    assert set(rule.carried(PAIRS)) <= {"a", "b", "w", "a2", "b2", "w2"}
    assert not rule.personal(PAIRS) & set(rule.carried(PAIRS))
    assert not rule.changes_base or set(rule.carried(PAIRS)) == {"w", "w2"}
    assert (sys.modules[type(rule).__module__].__doc__ or "").count("arXiv") or name == "frlora"


def test_rules_need_no_torch() -> None:
    code = (
        "import sys; from privfed.config import parse_config; "
        "parse_config({'server': {'aggregation': 'rolora'}, 'tuning': {'name': 'lora'}}, where='x'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
