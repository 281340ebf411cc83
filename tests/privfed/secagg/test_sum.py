"""The masked sum is the plain sum, whoever drops whenever."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.errors import SecAggError, ThresholdError
from privfed.secagg import ClientSession, Requirements, ServerSession, SessionParams
from privfed.secagg.keystream import BLOCK_BYTES
from privfed.secagg.ring import RING_BITS

EDGE = BLOCK_BYTES // 4
LENGTHS = st.sampled_from([0, 1, 2, 7, 64, EDGE - 1, EDGE, EDGE + 1])


def sparse(identify: Any, n: int, degree: int, threshold: int, n_min: int, **changes: Any) -> SessionParams:
    clients = tuple(f"c{i:03d}" for i in range(n))
    values: dict[str, Any] = {
        "round_id": b"round",
        "config_digest": bytes(32),
        "clients": clients,
        "identities": tuple(identify(client).public for client in clients),
        "degree": degree,
        "threshold": threshold,
        "n_min": n_min,
        "length": 17,
    }
    return SessionParams(**{**values, **changes})


@given(data=st.data(), n=st.integers(2, 8), length=LENGTHS, ring_bits=st.sampled_from(RING_BITS))
@settings(deadline=None, max_examples=60)
def test_any_drop_schedule_gives_the_plain_sum_or_a_threshold_error(
    make_params: Any, make_drive: Any, plain_sum: Any, data: st.DataObject, n: int, length: int, ring_bits: int
) -> None:
    threshold = data.draw(st.integers(max(2, n // 2 + 1), n), label="threshold")
    params = make_params(n, threshold, length, ring_bits=ring_bits)
    last = st.sampled_from([5, 5, 5, 5, 4, 3, 2, 1, 0])
    drops = {client: data.draw(last, label=client) for client in params.clients}
    drive = make_drive(params, drops=drops)
    if sum(stage == 5 for stage in drops.values()) < threshold:
        with pytest.raises(ThresholdError):
            drive.run()
        return
    total, survivors = drive.run()
    assert not drive.refused
    assert survivors == tuple(client for client in params.clients if drops[client] >= 3)
    assert total.dtype == np.uint32 and total.shape == (length,)
    assert np.array_equal(total, plain_sum(drive.vectors, survivors, ring_bits))


@given(data=st.data(), n=st.integers(5, 12), ring_bits=st.sampled_from(RING_BITS))
@settings(deadline=None, max_examples=40)
def test_a_sparse_graph_gives_the_plain_sum_or_a_threshold_error(
    identify: Any, make_drive: Any, plain_sum: Any, data: st.DataObject, n: int, ring_bits: int
) -> None:
    degree = 2 * data.draw(st.integers(1, (n - 2) // 2), label="half the degree")
    threshold = data.draw(st.integers(2, degree + 1), label="threshold")
    params = sparse(identify, n, degree, threshold, n // 2 + 1, ring_bits=ring_bits)
    last = st.sampled_from([5] * 8 + [4, 3, 2, 1, 0])
    drive = make_drive(params, drops={client: data.draw(last, label=client) for client in params.clients})
    try:
        total, survivors = drive.run()
    except ThresholdError:
        return
    assert np.array_equal(total, plain_sum(drive.vectors, survivors, ring_bits))


@pytest.mark.slow
def test_five_hundred_rounds_with_random_drops_never_give_a_wrong_sum(
    identify: Any, make_params: Any, make_drive: Any, plain_sum: Any
) -> None:
    """Some 2 % of the clients drop at each stage; both outcomes have to occur often for this to mean something."""
    rng = np.random.default_rng(2024)
    outcomes: Counter[str] = Counter()
    for number in range(500):
        n, ring_bits = int(rng.integers(4, 7)), int(rng.choice(RING_BITS))
        length = int(rng.integers(0, 40))
        if number % 3:
            params = make_params(n, n - 1, length, ring_bits=ring_bits, round_id=f"round-{number}".encode())
        else:
            params = sparse(identify, 7, 4, 3, 5, length=length, ring_bits=ring_bits)
        drops = {c: int(rng.integers(0, 5)) for c in params.clients if rng.random() < 0.15}
        drive = make_drive(params, drops=drops)
        try:
            total, survivors = drive.run()
        except ThresholdError:
            outcomes["aborted"] += 1
            continue
        assert np.array_equal(total, plain_sum(drive.vectors, survivors, ring_bits)), number
        outcomes["summed, dropped" if drops else "summed, complete"] += 1
    assert min(outcomes.values()) > 50 and len(outcomes) == 3, outcomes


def test_more_answers_than_the_threshold_are_fine(identify: Any, make_drive: Any, plain_sum: Any) -> None:
    names = [f"c{i:02d}" for i in range(60)]
    params = SessionParams.plan(
        {name: identify(name).public for name in names},
        Requirements(dropped=0.3, corrupt=0.1),
        round_id=b"round",
        config_digest=bytes(32),
        length=1001,
        ring_bits=24,
    )
    assert params.degree < 59  # the sparse graph
    drive = make_drive(params, drops={"c10": 0, "c03": 1, "c07": 2, "c19": 2, "c05": 3, "c41": 4})
    total, survivors = drive.run()
    assert len(survivors) == 56
    assert np.array_equal(total, plain_sum(drive.vectors, survivors, 24))


def test_the_input_is_not_changed_and_may_be_strided(make_params: Any, make_drive: Any, plain_sum: Any) -> None:
    params = make_params()
    base = np.arange(30, dtype=np.uint32).reshape(3, 10)
    vectors = {client: base[i, ::2] for i, client in enumerate(params.clients)}
    before = base.copy()
    total, survivors = make_drive(params, vectors).run()
    assert np.array_equal(total, plain_sum(vectors, survivors)) and np.array_equal(base, before)


def test_wrong_values_are_refused_and_the_call_may_be_repeated(make_params: Any, at_stage: Any) -> None:
    now = at_stage(make_params(ring_bits=24), "shares")
    outside = np.full(5, 2**24, np.uint32)
    for values in (np.zeros(4, np.uint32), np.zeros(5, np.float32), [0] * 5, np.zeros((5, 1), np.uint32), outside):
        with pytest.raises(SecAggError):
            now.clients["c0"].masked_input(now.shares["c0"], values)
    message = now.clients["c0"].masked_input(now.shares["c0"], now.vectors["c0"])
    assert now.server.receive_masked(message) == "c0"


def test_a_long_vector_is_summed_by_several_threads(make_params: Any, identify: Any) -> None:
    length = 1_000_003
    params = make_params(3, 2, length, ring_bits=20)
    server = ServerSession(params)
    clients = {c: ClientSession(params, c, identify(c)) for c in params.clients}
    for c in clients.values():
        server.receive_advertise(c.advertise())
    rosters = {c: server.roster_for(c) for c in clients}
    for name, c in clients.items():
        server.receive_share(c.share(rosters[name]))
    shares = {c: server.shares_for(c) for c in clients}
    vector = np.arange(length, dtype=np.uint32) & np.uint32(0xFFFFF)
    for name in ("c0", "c2"):
        server.receive_masked(clients[name].masked_input(shares[name], vector))
    survivors = {c: server.survivors_for(c) for c in ("c0", "c2")}
    for name, message in survivors.items():
        server.receive_agree(clients[name].agree(message))
    for name in survivors:
        server.receive_unmask(clients[name].unmask(server.agreement_for(name)))
    assert np.array_equal(server.sum()[0], 2 * vector & np.uint32(0xFFFFF))
