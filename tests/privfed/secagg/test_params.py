from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.errors import ConfigError
from privfed.privacy.discrete.params import corrupt_clients
from privfed.secagg import ClientSession, Identity, Requirements, SessionParams
from privfed.secagg.graph import Graph, from_bitmap, to_bitmap
from privfed.secagg.session import degree_and_threshold

KEYS = tuple(bytes([i]) * 32 for i in range(1, 7))


@pytest.mark.parametrize(
    "changes",
    [
        {"clients": ()},
        {"clients": ("a",), "threshold": 1},
        {"clients": ["a", "b", "c"]},
        {"clients": ("b", "a", "c")},
        {"clients": ("a", "a", "c")},
        {"clients": ("", "b", "c")},
        {"clients": ("a", "b", "c" * 129)},
        {"clients": ("a", "b", "\ud800"), "identities": KEYS[:3]},
        {"clients": ("a", "b", 3), "identities": KEYS[:3]},
        {"identities": KEYS[:2]},
        {"identities": list(KEYS[:3])},
        {"identities": (KEYS[0], KEYS[0], KEYS[1])},
        {"identities": (KEYS[0], KEYS[1], b"short")},
        {"degree": 1},
        {"degree": 3},
        {"n": 6, "degree": 3},
        {"n": 6, "degree": 0},
        {"n": 6, "degree": 4, "threshold": 6, "n_min": 4},
        {"threshold": 1, "n_min": 2},
        {"threshold": 4, "n_min": 3},
        {"threshold": 2.0, "n_min": 2},
        {"n_min": 1},
        {"n_min": 4},
        {"n": 4, "n_min": 2},
        {"n": 4, "threshold": 2, "n_min": 3},
        {"n": 4, "corrupt": 2},
        {"n": 4, "corrupt": 1, "n_min": 2},
        {"n": 5, "corrupt": 1, "threshold": 3, "n_min": 4, "degree": 4.0},
        {"corrupt": -1},
        {"length": -1},
        {"length": 2**31},
        {"length": True},
        {"ring_bits": 25},
        {"round_id": b""},
        {"round_id": "text"},
        {"round_id": bytes(65)},
        {"config_digest": b""},
    ],
)
def test_parameters_that_cannot_hold_are_refused(make_params: Any, changes: dict[str, Any]) -> None:
    make_params()
    with pytest.raises(ConfigError):
        make_params(**changes)


def plan(n: int, **requirements: Any) -> SessionParams:
    return SessionParams.plan(
        {f"c{i:05d}": i.to_bytes(32, "little") for i in range(n)},
        Requirements(**requirements),
        round_id=b"round",
        config_digest=bytes(32),
        length=3,
    )


@pytest.mark.parametrize(("n", "n_min"), [(3, 3), (4, 3), (5, 4), (6, 5), (10, 7), (20, 14), (300, 210)])
def test_n_min_is_what_the_dropped_share_leaves(n: int, n_min: int) -> None:
    assert plan(n).n_min == n_min


@given(
    n=st.integers(2, 130),
    dropped=st.floats(0, 0.49),
    corrupt=st.floats(0, 0.9),
    server=st.sampled_from(["curious", "malicious"]),
)
def test_a_plan_is_safe_or_refused(n: int, dropped: float, corrupt: float, server: str) -> None:
    try:
        params = plan(n, dropped=dropped, corrupt=corrupt, server=server)
    except ConfigError:
        assert 2 * dropped + corrupt >= 1 or math.ceil(corrupt * n - 1e-9) + 2 > n
        return
    assert params.corrupt == math.ceil(corrupt * n - 1e-9)
    assert 2 * params.n_min > n + params.corrupt and params.n_min >= params.corrupt + 2
    assert 2 * params.quorum > n + params.corrupt and params.quorum <= params.n_min
    left = n - int(dropped * n)
    assert params.n_min == max(left, params.quorum, params.corrupt + 2) <= left + 1
    if params.degree == n - 1:  # what may drop still leaves enough shares, and no two lists give both secrets
        assert params.threshold <= params.n_min and 2 * params.threshold > n + params.corrupt
    else:
        assert n > 50 and params.threshold <= params.degree


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"dropped": 0.5, "corrupt": 0.1}, "2 dropped"),
        ({"dropped": 0.45, "corrupt": 0.1}, "2 dropped"),
        ({"dropped": -0.1}, "2 dropped"),
        ({"corrupt": 1.0}, "2 dropped"),
        ({"sigma": 10.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"eta": float("inf")}, "sigma"),
    ],
)
def test_requirements_that_cannot_be_safe_are_refused_in_a_sentence(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        Requirements(**values)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(("n", "n_min", "why"), [(10, 5, "at least 6"), (10, 8, "may survive"), (4, 9, "may survive")])
def test_an_n_min_that_is_unsafe_or_cannot_be_had_is_refused(n: int, n_min: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        plan(n, n_min=n_min)


@pytest.mark.parametrize("corrupt", [0.5, 0.1, 0.01])
def test_a_lone_honest_client_is_refused(corrupt: float) -> None:
    with pytest.raises(ConfigError, match=r"less theirs.*secagg.corrupt = 0.0"):
        plan(2, dropped=0.0, corrupt=corrupt)
    assert plan(2, dropped=0.0, corrupt=0.0).n_min == 2


@given(n=st.integers(2, 3000), hundredths=st.integers(0, 99))
def test_masks_and_noise_count_the_same_corrupt_clients(n: int, hundredths: int) -> None:
    """A share of the cohort is rounded up, on both sides, and an exact one is not one client more."""
    corrupt = hundredths / 100
    assert Requirements(dropped=0.0, corrupt=corrupt).most_corrupt(n) == -(-hundredths * n // 100)
    assert corrupt_clients(n, corrupt) == -(-hundredths * n // 100)


@given(n=st.integers(0, 200), corrupt=st.floats(0, 0.9), n_min=st.none() | st.integers(2, 60))
def test_a_cohort_meets_the_requirements_where_a_session_of_it_can_be_planned(
    n: int, corrupt: float, n_min: int | None
) -> None:
    met = Requirements(dropped=0.0, corrupt=corrupt, n_min=n_min).met_by(n)
    try:
        found = plan(n, dropped=0.0, corrupt=corrupt, n_min=n_min)
    except ConfigError:
        assert not met
        return
    assert met and len(found.clients) == n


def test_small_cohorts_are_complete_and_large_ones_are_not() -> None:
    assert degree_and_threshold(50, Requirements()) == (49, 28)
    degree, threshold = degree_and_threshold(100, Requirements())
    assert degree == 42 and threshold > 10
    assert degree_and_threshold(100, Requirements(server="curious"))[0] == 32
    # nothing sparser stands this, and the complete graph does
    assert degree_and_threshold(61, Requirements(dropped=0.0, corrupt=0.95))[0] == 60


def test_a_client_outside_the_cohort_or_with_another_identity_is_refused(make_params: Any, identify: Any) -> None:
    with pytest.raises(ConfigError, match="'z'"):
        ClientSession(make_params(), "z", identify("z"))
    with pytest.raises(ConfigError, match="another identity"):
        ClientSession(make_params(), "c0", Identity.generate())


@given(n=st.integers(4, 40), half=st.integers(1, 19), seed=st.binary(min_size=1, max_size=8))
def test_the_graph_is_regular_symmetric_and_connected(n: int, half: int, seed: bytes) -> None:
    degree = 2 * min(half, (n - 2) // 2)
    graph = Graph(seed, n, degree)
    near = {i: graph.neighbours(i) for i in range(n)}
    assert all(len(set(near[i])) == degree and i not in near[i] for i in range(n))
    assert all(i in near[j] for i in range(n) for j in near[i])
    assert all(graph.holders(i) == tuple(sorted((*near[i], i))) for i in range(n))
    reached, waiting = {0}, [0]
    while waiting:
        new = set(near[waiting.pop()]) - reached
        reached |= new
        waiting += new
    assert reached == set(range(n))


def test_the_graph_depends_on_the_round() -> None:
    rings = {tuple(Graph(bytes([i]), 30, 4).neighbours(0)) for i in range(20)}
    assert len(rings) > 15


@given(data=st.data(), n=st.integers(1, 70))
def test_bitmaps_are_sets(data: st.DataObject, n: int) -> None:
    chosen = data.draw(st.sets(st.integers(0, n - 1)))
    raw = to_bitmap(chosen, n)
    assert len(raw) == (n + 7) // 8 and from_bitmap(raw, n) == tuple(sorted(chosen))
