"""What leaves a client: no plain vector, never both shares of one peer, no secret in a repr, no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privfed.errors import SecAggError
from privfed.secagg import ClientSession, ServerSession, keys
from privfed.secagg.keystream import apply_masks
from privfed.secagg.ring import add_into
from privfed.secagg.shamir import combine_bytes, lagrange_weights
from privfed.secagg.wire import Wire

LENGTH = 20_000


def p_value(values_M: np.ndarray) -> float:
    """Return the chi-square p-value of the bytes being uniform."""
    counts = np.bincount(values_M.astype("<u4").view(np.uint8), minlength=256)
    return float(stats.chisquare(counts).pvalue)


@pytest.mark.parametrize("n", [2, 5])
def test_what_the_server_receives_of_one_client_looks_uniform(make_params: Any, make_drive: Any, n: int) -> None:
    params = make_params(n, n, LENGTH)
    rng = np.random.default_rng(5)
    vectors = {c: (1000 + rng.normal(0, 50, LENGTH)).astype(np.uint32) for c in params.clients}
    drive = make_drive(params, vectors)
    total, _ = drive.run()
    wire = Wire(params)
    received = {c: wire.decode_masked(drive.seen["masked", c])[3] for c in params.clients}
    for client, masked in received.items():
        assert p_value(vectors[client]) < 1e-12  # the test does tell a plain vector from noise
        assert p_value(masked) > 1e-6
        assert np.count_nonzero(masked == vectors[client]) < 5
        assert abs(np.corrcoef(masked, vectors[client])[0, 1]) < 0.05
        assert vectors[client].tobytes()[:64] not in drive.seen["masked", client]
    assert p_value(total) < 1e-12
    if n > 2:  # a sum of some only is still masked: pairwise masks with the others, and all self masks
        part = sum((received[c] for c in params.clients[1:]), np.zeros(LENGTH, np.uint32))
        assert p_value(part) > 1e-6


def test_a_late_vector_stays_masked_by_its_self_mask(make_params: Any, at_stage: Any) -> None:
    params = make_params(3, 2, LENGTH)
    wire = Wire(params)
    now = at_stage(params, "masked")
    for c in ("c0", "c1"):
        now.server.receive_masked(now.masked[c])
    survivors = now.server.survivors()
    with pytest.raises(SecAggError):
        now.server.receive_masked(now.masked["c2"])
    reveals = [wire.decode_unmask(now.clients[c].unmask(survivors))[1] for c in ("c0", "c1")]
    weights = lagrange_weights(params.points(["c0", "c1"]))
    private = keys.load_private(combine_bytes(weights, [reveal.key_shares["c2"] for reveal in reveals]))
    roster = wire.decode_roster(now.roster)
    own = ("c2", roster["c2"].masking)
    pairwise = [
        keys.pairwise_mask_key(private, params.scope, own, (peer, roster[peer].masking)) for peer in ("c0", "c1")
    ]
    late = wire.decode_masked(now.masked["c2"])[3].astype(np.uint32)
    apply_masks(late, pairwise)  # c2 has the highest id, so it subtracted both
    assert p_value(late) > 1e-6 and p_value(late - now.vectors["c2"]) > 1e-6
    assert np.count_nonzero(late == now.vectors["c2"]) < 5


def test_fresh_secrets_every_session(make_params: Any, make_drive: Any) -> None:
    params = make_params()
    first, second = make_drive(params), make_drive(params)
    assert np.array_equal(first.run()[0], second.run()[0])
    wire = Wire(params)
    for client in params.clients:
        one, two = (wire.decode_masked(drive.seen["masked", client])[3] for drive in (first, second))
        assert not np.array_equal(one, two)
        one_keys, two_keys = (wire.decode_advertise(d.seen["advertise", client])[1] for d in (first, second))
        assert one_keys.masking != two_keys.masking and one_keys.channel != two_keys.channel


@given(lists=st.lists(st.sets(st.sampled_from(["c0", "c1", "c2", "c3", "c4"])), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_no_sequence_of_survivor_lists_gets_both_shares_of_a_peer(
    make_params: Any, make_drive: Any, lists: list[set[str]]
) -> None:
    params = make_params(5, 3, 1)
    wire = Wire(params)
    drive = make_drive(params)
    drive.collect()
    for client_id, client in drive.clients.items():
        kinds: dict[str, set[str]] = {peer: set() for peer in params.clients}
        for names in lists:
            try:
                _, reveal = wire.decode_unmask(client.unmask(wire.encode_survivors(names)))
            except SecAggError:
                continue
            assert client_id in names and len(names) >= 3
            for peer in reveal.seed_shares:
                kinds[peer].add("seed")
            for peer in reveal.key_shares:
                kinds[peer].add("key")
        assert all(len(kind) <= 1 for kind in kinds.values())
        assert {peer: {kind} for peer, kind in client.answered.items()} == {p: k for p, k in kinds.items() if k}


def test_known_limit_a_lying_server_isolates_a_vector_when_t_is_near_half(make_params: Any, make_drive: Any) -> None:
    """Lists are not yet compared among clients, so 2t > n alone does not protect one vector (see session.py).

    Eleven of twenty is the threshold. The victim is told that only it and a group of ten shared; the others
    see all. Each other client is told a list of survivors that has the victim and as few of the group as it
    accepts. Once clients compare signed lists this test must fail, and then be turned round.
    """
    params = make_params(20, 11, 4)
    wire = Wire(params)
    ids = params.clients
    victim, group, rest = ids[0], list(ids[1:11]), list(ids[11:])

    def lie(stage: str, client: str, message: bytes) -> bytes:
        if (stage, client) == ("shares", victim):
            _, shares = wire.decode_shares(message)
            return wire.encode_shares(victim, {c: shares[c] for c in group})
        if stage == "survivors":
            if client in group:
                names = [victim, client, *rest]
            else:
                spare = group[rest.index(client)]
                names = [victim, spare, *rest]
            return wire.encode_survivors(names)
        return message

    drive = make_drive(params, tamper=lie)
    with pytest.raises(SecAggError):  # an honest server refuses the answers; the lying one keeps them
        drive.run()
    reveals = {c: wire.decode_unmask(m)[1] for (s, c), m in drive.seen.items() if s == "unmask"}
    roster = wire.decode_roster(drive.seen["roster", victim])

    def recover(peer: str, kind: str) -> bytes:
        held = {c: getattr(r, kind)[peer] for c, r in reveals.items() if peer in getattr(r, kind)}
        helpers = sorted(held)[:11]
        return combine_bytes(lagrange_weights(params.points(helpers)), [held[c] for c in helpers])

    seed = recover(victim, "seed_shares")
    bare = wire.decode_masked(drive.seen["masked", victim])[3].astype(np.uint32)
    minus = [keys.self_mask_key(seed, params.scope, victim)]
    for peer in group:
        private = keys.load_private(recover(peer, "key_shares"))
        own, other = (peer, roster[peer].masking), (victim, roster[victim].masking)
        minus.append(keys.pairwise_mask_key(private, params.scope, own, other))
    apply_masks(bare, [], minus)  # the victim has the lowest id, so it added every mask
    assert np.array_equal(bare, drive.vectors[victim])


def test_no_secret_is_shown(make_params: Any) -> None:
    params = make_params()
    sessions = [ClientSession(params, c) for c in params.clients]
    server = ServerSession(params)
    for session in sessions:
        server.receive_advertise(session.advertise())
    roster = server.roster()
    messages = [session.share(roster) for session in sessions]
    for session in sessions:
        own = session._keys
        assert own is not None
        secrets = [own.seed, own.masking.private_bytes_raw(), own.channel.private_bytes_raw()]
        secrets += [share for pair in session._held.values() for share in pair]
        shown = repr(session) + repr(own) + repr(server) + str(session) + repr(params)
        for secret in secrets:
            assert repr(secret)[2:-1] not in shown and secret.hex() not in shown
            assert all(secret not in message for message in messages)


def test_secrets_are_dropped_as_soon_as_they_are_not_needed(make_params: Any, at_stage: Any) -> None:
    now = at_stage(make_params(), "survivors")
    assert all(client._keys is None for client in now.clients.values())
    client = now.clients["c0"]
    client.unmask(now.survivors)
    assert not client._held and set(client.answered.values()) == {"seed"}
    failed = at_stage(make_params(), "roster").clients["c0"]
    with pytest.raises(SecAggError):
        failed.share(now.roster)
    assert failed._keys is None and not failed._held


def test_the_server_keeps_no_single_vector(make_params: Any, at_stage: Any) -> None:
    now = at_stage(make_params(3, 2, 5), "masked")
    wire = Wire(make_params(3, 2, 5))
    running = np.zeros(5, np.uint32)
    for c in ("c0", "c1", "c2"):
        now.server.receive_masked(now.masked[c])
        add_into(running, wire.decode_masked(now.masked[c])[3])
    arrays = [value for value in vars(now.server).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 1 and np.array_equal(arrays[0], running)


def test_secure_aggregation_imports_no_torch() -> None:
    code = "import sys, privfed.secagg; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
