"""Messages and calls out of order, repeated, foreign, altered or too few end in the typed error of their cause."""

from __future__ import annotations

import copy
import pickle
import zlib
from typing import Any

import numpy as np
import pytest

from privfed.errors import (
    AuthenticityError,
    EquivocationError,
    MessageError,
    ProtocolError,
    SecAggError,
    ShareError,
    StageError,
    ThresholdError,
)
from privfed.secagg import ClientSession, Identity, ServerSession, keys
from privfed.secagg.frame import CRC_BYTES, Stage
from privfed.secagg.wire import Card, Wire

STAGES = ["advertise", "roster", "share", "shares", "masked", "survivors", "agree", "agreement", "unmask"]
TO_SERVER = {"advertise", "share", "masked", "agree", "unmask"}


def to_client(client: ClientSession, stage: str, message: bytes) -> bytes:
    if stage == "shares":
        return client.masked_input(message, np.zeros(5, np.uint32))
    return {"roster": client.share, "survivors": client.agree, "agreement": client.unmask}[stage](message)


def deliver(now: Any, stage: str, message: bytes) -> None:
    """Deliver a message of this stage that comes from, or goes to, client c0."""
    if stage in TO_SERVER:
        getattr(now.server, f"receive_{stage}")(message)
    else:
        to_client(now.clients["c0"], stage, message)


def with_new_checksum(message: bytes) -> bytes:
    """Return a server's message as an attacker would send it: altered, with a checksum that fits."""
    return message[:-CRC_BYTES] + zlib.crc32(message[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little")


@pytest.mark.parametrize("stage", STAGES)
def test_every_damaged_byte_is_refused_and_the_true_message_still_counts(
    make_params: Any, at_stage: Any, stage: str
) -> None:
    now = at_stage(make_params(), stage)
    message = getattr(now, stage)["c0"]
    for i in range(len(message)):
        for mask in (0x01, 0x80, 0xFF):
            with pytest.raises(ProtocolError):
                deliver(now, stage, message[:i] + bytes([message[i] ^ mask]) + message[i + 1 :])
    deliver(now, stage, message)


@pytest.mark.parametrize("stage", STAGES)
def test_every_byte_altered_on_purpose_releases_no_wrong_sum(
    make_params: Any, make_drive: Any, plain_sum: Any, stage: str
) -> None:
    params = make_params(3, 2, 3)
    probe = make_drive(params)
    probe.run()
    size = len(probe.seen[stage, "c1"])
    trailer = CRC_BYTES if stage not in TO_SERVER else 0
    released = 0
    for i in range(size - trailer):

        def tamper(at: str, client: str, message: bytes, i: int = i) -> bytes:
            if (at, client) != (stage, "c1"):
                return message
            altered = message[:i] + bytes([message[i] ^ 1 << (i % 8)]) + message[i + 1 :]
            return altered if stage in TO_SERVER else with_new_checksum(altered)

        drive = make_drive(params, tamper=tamper)
        try:
            total, survivors = drive.run()
        except SecAggError:
            continue
        assert drive.refused, f"byte {i} of {stage} went unnoticed"
        assert np.array_equal(total, plain_sum(drive.vectors, survivors)), f"byte {i} of {stage}"
        released += 1
    # one client is lost at any stage, never the round: two of three are enough
    assert released == size - trailer


@pytest.mark.parametrize("stage", STAGES)
def test_cut_longer_and_foreign_messages_are_refused(
    make_params: Any, at_stage: Any, identify: Any, stage: str
) -> None:
    now = at_stage(make_params(), stage)
    message = getattr(now, stage)["c0"]
    strangers = [
        make_params(round_id=b"round-2"),
        make_params(config_digest=b"x" * 32),
        make_params(threshold=3),
        make_params(n_min=3),
        make_params(ring_bits=24),
        make_params(length=6),
        make_params(clients=("c0", "c1", "c3")),
    ]
    foreign = [getattr(at_stage(params, stage), stage)["c0"] for params in strangers]
    for bad in [b"", message[:30], message[:-1], message + b"\0", b"\xff" * 500, None, 7, "text", *foreign]:
        with pytest.raises(MessageError):
            deliver(now, stage, bad)  # type: ignore[arg-type]
    deliver(now, stage, message)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("other", STAGES)
def test_a_message_serves_its_own_stage_once(make_params: Any, at_stage: Any, stage: str, other: str) -> None:
    now = at_stage(make_params(), stage)
    wrong = getattr(at_stage(make_params(), other), other)["c0"]
    if other != stage:
        with pytest.raises(MessageError):
            deliver(now, stage, wrong)
    if STAGES.index(other) - STAGES.index(stage) not in (0, 1):  # the receiver of the next stage may be waiting
        with pytest.raises(StageError):
            deliver(now, other, wrong)
    message = getattr(now, stage)["c0"]
    deliver(now, stage, message)
    with pytest.raises(StageError):
        deliver(now, stage, message)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in TO_SERVER])
def test_a_message_for_another_client_is_refused_and_the_own_one_still_counts(
    make_params: Any, at_stage: Any, stage: str
) -> None:
    now = at_stage(make_params(), stage)
    with pytest.raises(MessageError, match="for client 'c1'"):
        deliver(now, stage, getattr(now, stage)["c1"])
    deliver(now, stage, getattr(now, stage)["c0"])


def test_client_calls_out_of_order_are_refused(make_params: Any, at_stage: Any, identify: Any) -> None:
    params = make_params()
    now = at_stage(params, "unmask")

    def calls(client: ClientSession) -> dict[str, Any]:
        return {
            "advertise": client.advertise,
            **{s: lambda s=s: to_client(client, s, getattr(now, s)["c0"]) for s in STAGES if s not in TO_SERVER},
        }

    for name in ("roster", "shares", "survivors", "agreement"):
        with pytest.raises(StageError, match="NEW"):
            calls(ClientSession(params, "c0", identify("c0")))[name]()
    for call in calls(now.clients["c0"]).values():
        with pytest.raises(StageError, match="DONE"):
            call()


def test_server_calls_out_of_order_are_refused(make_params: Any, at_stage: Any) -> None:
    params = make_params()
    server = ServerSession(params)
    for call in (server.shares_for, server.survivors_for, server.agreement_for, lambda _: server.sum()):
        with pytest.raises(StageError, match="ADVERTISE"):
            call("c0")
    now = at_stage(params, "unmask")
    for c in params.clients:
        now.server.receive_unmask(now.unmask[c])
    now.server.sum()
    for call in (now.server.roster_for, now.server.shares_for, now.server.agreement_for, lambda _: now.server.sum()):
        with pytest.raises(StageError, match="DONE"):
            call("c0")
    assert "DONE" in repr(now.server)


def test_the_server_refuses_to_go_on_below_n_min_and_may_wait(
    make_params: Any, random_vectors: Any, plain_sum: Any, identify: Any
) -> None:
    params = make_params(4, 3, 5)
    vectors = random_vectors(params)
    server = ServerSession(params)
    clients = {c: ClientSession(params, c, identify(c)) for c in ("c0", "c1", "c2")}

    def stage(messages: dict[str, bytes], receive: Any, close: Any) -> dict[str, bytes]:
        first, second, third = messages.values()
        receive(first)
        receive(second)
        with pytest.raises(ThresholdError, match="Only 2 clients"):
            close("c0")
        receive(third)
        return {c: close(c) for c in clients}

    rosters = stage({c: s.advertise() for c, s in clients.items()}, server.receive_advertise, server.roster_for)
    shares = stage({c: s.share(rosters[c]) for c, s in clients.items()}, server.receive_share, server.shares_for)
    for name in ("c3", "zz"):
        with pytest.raises(StageError, match="did not do the stage before"):
            server.shares_for(name)
    masked = {c: s.masked_input(shares[c], vectors[c]) for c, s in clients.items()}
    survivors = stage(masked, server.receive_masked, server.survivors_for)
    agreed = stage({c: s.agree(survivors[c]) for c, s in clients.items()}, server.receive_agree, server.agreement_for)
    answers = {c: s.unmask(agreed[c]) for c, s in clients.items()}
    server.receive_unmask(answers["c0"])
    server.receive_unmask(answers["c2"])
    with pytest.raises(ThresholdError, match="Only 2 holders"):
        server.sum()
    server.receive_unmask(answers["c1"])
    total, names = server.sum()
    assert np.array_equal(total, plain_sum(vectors, names)) and names == ("c0", "c1", "c2")


def test_a_client_refuses_to_go_on_below_n_min(make_params: Any, at_stage: Any) -> None:
    params = make_params(4, 3, 5)
    wire = Wire(params)
    now = at_stage(params, "roster")
    _, key, _, cards = wire.decode_roster(now.roster["c0"])
    with pytest.raises(ThresholdError, match="advertised"):
        now.clients["c0"].share(wire.encode_roster(0, key, {0: cards[1], 1: cards[1]}))
    now = at_stage(params, "shares")
    _, _, sealed = wire.decode_shares(now.shares["c0"])
    with pytest.raises(ThresholdError, match="shared"):
        now.clients["c0"].masked_input(wire.encode_shares(0, [0, 1], {1: sealed[1]}), np.zeros(5, np.uint32))
    now = at_stage(params, "survivors")
    _, _, confirmed = wire.decode_survivors(now.survivors["c0"])
    with pytest.raises(ThresholdError, match="survived"):
        now.clients["c0"].agree(wire.encode_survivors(0, [0, 1], {1: confirmed[1]}))
    with pytest.raises(StageError):  # and a second try is not answered either
        now.clients["c0"].agree(now.survivors["c0"])


def test_a_client_refuses_survivors_that_never_shared_and_a_sum_without_itself(make_params: Any, at_stage: Any) -> None:
    params = make_params(4, 3, 5)
    wire = Wire(params)
    for names, reason in [([0, 1, 2, 3], "never shared"), ([1, 2, 3], "never shared"), ([1, 2], "leaves client")]:
        now = at_stage(params, "shares")
        _, _, sealed = wire.decode_shares(now.shares["c0"])
        three = wire.encode_shares(0, [0, 1, 2], {1: sealed[1], 2: sealed[2]})
        now.clients["c0"].masked_input(three, now.vectors["c0"])
        with pytest.raises(EquivocationError, match=reason):
            now.clients["c0"].agree(wire.encode_survivors(0, names, dict.fromkeys(set(names) - {0}, bytes(16))))


@pytest.mark.parametrize("stage", ["roster", "shares"])
def test_a_client_left_out_does_not_answer(make_params: Any, at_stage: Any, stage: str) -> None:
    params = make_params(4, 3, 5)
    wire = Wire(params)
    now = at_stage(params, stage)
    if stage == "roster":
        _, key, _, cards = wire.decode_roster(now.roster["c0"])
        message = wire.encode_roster(0, key, {c: cards[c] for c in (1, 2, 3)})
    else:
        _, _, sealed = wire.decode_shares(now.shares["c0"])
        message = wire.encode_shares(0, [1, 2, 3], sealed)
    with pytest.raises(EquivocationError, match="leaves client 'c0' out"):
        deliver(now, stage, message)


def test_a_swapped_key_and_a_foreign_rounds_key_are_refused(make_params: Any, at_stage: Any, identify: Any) -> None:
    params = make_params()
    wire = Wire(params)
    mallory = Identity.generate()
    fresh = keys.generate_keys(params.scope, "c2")
    other_round = make_params(round_id=b"round-2")
    foreign = ClientSession(other_round, "c2", identify("c2")).advertise()
    _, foreign_card = Wire(other_round).decode_advertise(foreign)
    body = wire._advertise_body(2, fresh.public)
    forgeries = [
        Card(keys=fresh.public, signature=mallory.sign(wire.context, body)),
        Card(keys=fresh.public, signature=bytes(64)),
        foreign_card,
    ]
    for card in forgeries:
        now = at_stage(params, "roster")
        _, key, _, cards = wire.decode_roster(now.roster["c0"])
        forged = wire.encode_roster(0, key, {0: cards[1], **cards, 2: card})
        with pytest.raises(AuthenticityError, match="client 'c2' is not signed"):
            now.clients["c0"].share(forged)
        with pytest.raises(StageError):  # the client is out of this round
            now.clients["c0"].share(now.roster["c0"])
        server = ServerSession(params)
        with pytest.raises(AuthenticityError, match="'c2'"):
            server.receive_advertise(wire._advertise_body(2, card.keys) + card.signature)


def test_two_clients_keys_cannot_change_places(make_params: Any, at_stage: Any) -> None:
    params = make_params()
    wire = Wire(params)
    now = at_stage(params, "roster")
    _, key, _, cards = wire.decode_roster(now.roster["c0"])
    with pytest.raises(AuthenticityError):
        now.clients["c0"].share(wire.encode_roster(0, key, {0: cards[1], 1: cards[2], 2: cards[1]}))


def test_shares_are_opened_only_as_they_were_sealed(make_params: Any, at_stage: Any) -> None:
    params = make_params()
    wire = Wire(params)
    now = at_stage(params, "shares")
    _, sharers, mine = wire.decode_shares(now.shares["c0"])
    with pytest.raises(AuthenticityError, match="not authentic"):
        now.clients["c0"].masked_input(wire.encode_shares(0, sharers, {1: mine[2], 2: mine[1]}), np.zeros(5, np.uint32))
    _, _, theirs = wire.decode_shares(now.shares["c1"])
    with pytest.raises(AuthenticityError, match="'c0' are not authentic"):
        now.clients["c1"].masked_input(wire.encode_shares(1, sharers, {**theirs, 0: mine[2]}), np.zeros(5, np.uint32))


def test_masking_against_other_clients_is_noticed(make_params: Any, at_stage: Any) -> None:
    params = make_params(4, 3, 5)
    wire = Wire(params)
    now = at_stage(params, "shares")
    _, _, mine = wire.decode_shares(now.shares["c0"])
    fewer = wire.encode_shares(0, [0, 1, 2], {1: mine[1], 2: mine[2]})
    with pytest.raises(EquivocationError, match="masked against other clients"):
        now.server.receive_masked(now.clients["c0"].masked_input(fewer, np.zeros(5, np.uint32)))


def test_an_altered_masked_vector_costs_its_client_and_not_the_round(
    make_params: Any, make_drive: Any, plain_sum: Any
) -> None:
    params = make_params()

    def forge(stage: str, client: str, message: bytes) -> bytes:
        if (stage, client) != ("masked", "c1"):
            return message
        at = len(message) - 16 - 4
        return message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]

    drive = make_drive(params, tamper=forge)
    total, survivors = drive.run()
    assert survivors == ("c0", "c2") and np.array_equal(total, plain_sum(drive.vectors, survivors))
    assert [type(error) for error in drive.refused] == [AuthenticityError] and "'c1'" in str(drive.refused[0])


@pytest.mark.parametrize("kind", ["self-mask seed", "masking key"])
def test_a_lying_share_is_noticed_and_names_whose_secret(make_params: Any, at_stage: Any, kind: str) -> None:
    """A client that lies has its own tag key, so its message is authentic and only the secret can tell."""
    params = make_params(4, 3, 5)
    wire = Wire(params)
    victim = {"self-mask seed": 1, "masking key": 3}[kind]
    now = at_stage(params, "masked")
    alive = ["c0", "c1", "c2"]
    for c in alive:
        now.server.receive_masked(now.masked[c])
    for c in alive:
        now.server.receive_agree(now.clients[c].agree(now.server.survivors_for(c)))
    liar = now.clients["c0"]
    tag_key = liar._server_tag[Stage.UNMASK]
    for c in alive:
        message = now.clients[c].unmask(now.server.agreement_for(c))
        if c == "c0":
            _, shares = wire.decode_unmask(message, range(4))
            message = wire.encode_unmask(0, tag_key, {**shares, victim: bytes(33)})
        now.server.receive_unmask(message)
    with pytest.raises(ShareError, match=f"shares of client 'c{victim}' do not give the {kind}") as caught:
        now.server.sum()
    assert caught.value.peer == f"c{victim}"


def test_copied_and_degenerate_keys_are_refused_and_the_rest_go_on(make_params: Any, identify: Any) -> None:
    params = make_params()
    wire = Wire(params)
    server = ServerSession(params)
    message = ClientSession(params, "c0", identify("c0")).advertise()
    _, card = wire.decode_advertise(message)
    server.receive_advertise(message)
    fresh = keys.generate_keys(params.scope, "c1").public
    weak = (1).to_bytes(32, "little")
    for masking, channel, why in [
        (card.keys.masking, fresh.channel, "another client uses"),
        (weak, fresh.channel, "degenerate"),
        (fresh.masking, bytes(32), "degenerate"),
        (fresh.masking, fresh.masking, "it needs two"),
    ]:
        bad = keys.PublicKeys(masking=masking, channel=channel, seed_commitment=bytes(32))
        with pytest.raises(MessageError, match=why):
            server.receive_advertise(wire.encode_advertise(1, bad, identify("c1")))
    assert server.receive_advertise(ClientSession(params, "c1", identify("c1")).advertise()) == "c1"


def test_a_copied_key_is_refused_by_clients_as_well(make_params: Any, at_stage: Any, identify: Any) -> None:
    params = make_params()
    wire = Wire(params)
    now = at_stage(params, "roster")
    _, key, _, cards = wire.decode_roster(now.roster["c0"])
    mine = now.clients["c0"]._keys.public
    body = wire._advertise_body(1, mine)
    copied = Card(keys=mine, signature=identify("c1").sign(wire.context, body))
    with pytest.raises(MessageError, match="occurs twice"):
        now.clients["c0"].share(wire.encode_roster(0, key, {0: cards[1], 1: copied, 2: cards[2]}))


def test_an_agreement_has_to_be_a_quorum_of_survivors_under_the_same_lists(
    make_params: Any, at_stage: Any, identify: Any
) -> None:
    params = make_params(5, 3, 5)
    wire = Wire(params)

    def forged(signatures: dict[int, bytes]) -> type[Exception]:
        now = at_stage(params, "agreement")
        with pytest.raises(ProtocolError) as caught:
            now.clients["c0"].unmask(wire.encode_agreement(0, signatures))
        assert now.clients["c0"].answered == {}
        return caught.type

    now = at_stage(params, "agreement")
    _, true = wire.decode_agreement(now.agreement["c0"])
    assert len(true) == params.quorum == 3
    other_list = identify("c1").sign(wire.context, wire._agree_body(1, range(5), range(4)))
    assert forged({0: true[0], 1: true[1]}) is MessageError  # too few
    assert forged({**true, 3: true[2]}) is MessageError  # more than asked for
    assert forged({**true, 1: other_list}) is EquivocationError
    assert forged({**true, 1: true[2]}) is EquivocationError
    assert forged({**true, 1: bytes(64)}) is EquivocationError


def test_a_signer_that_did_not_survive_does_not_count(make_params: Any, at_stage: Any, identify: Any) -> None:
    params = make_params(5, 3, 5)
    wire = Wire(params)
    now = at_stage(params, "survivors")
    _, _, confirmed = wire.decode_survivors(now.survivors["c0"])
    alive = [0, 1, 2]
    now.clients["c0"].agree(wire.encode_survivors(0, alive, {c: confirmed[c] for c in (1, 2)}))
    signatures = {c: identify(f"c{c}").sign(wire.context, wire._agree_body(c, range(5), alive)) for c in (0, 1, 4)}
    with pytest.raises(EquivocationError, match="did not survive"):
        now.clients["c0"].unmask(wire.encode_agreement(0, signatures))


def test_a_missing_or_foreign_confirmation_is_refused(make_params: Any, at_stage: Any) -> None:
    params = make_params(4, 3, 5)
    wire = Wire(params)
    for bad in (bytes(16), None):
        now = at_stage(params, "survivors")
        _, alive, confirmed = wire.decode_survivors(now.survivors["c0"])
        confirmed[2] = confirmed[1] if bad is None else bad
        with pytest.raises(EquivocationError, match="'c2' did not confirm"):
            now.clients["c0"].agree(wire.encode_survivors(0, alive, confirmed))


def test_an_identity_takes_part_in_a_round_once(make_params: Any, identify: Any) -> None:
    """Else two sessions of one round could sign two lists of survivors."""
    one = identify("c0")
    ClientSession(make_params(), "c0", one).advertise()
    with pytest.raises(StageError, match="new round id"):
        ClientSession(make_params(), "c0", one).advertise()
    ClientSession(make_params(round_id=b"round-1, second attempt"), "c0", one).advertise()


def test_a_client_session_is_never_copied_or_stored(make_params: Any, identify: Any) -> None:
    session = ClientSession(make_params(), "c0", identify("c0"))
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(StageError, match="cannot be copied"):
            duplicate(session)


def test_the_server_keeps_its_head_when_a_stranger_signs(make_params: Any, at_stage: Any, identify: Any) -> None:
    params = make_params(4, 3, 5)
    wire = Wire(params)
    now = at_stage(params, "masked")
    for c in ("c0", "c1", "c2"):
        now.server.receive_masked(now.masked[c])
    for c in ("c0", "c1", "c2"):
        now.server.receive_agree(now.clients[c].agree(now.server.survivors_for(c)))
    with pytest.raises(StageError, match="did not do the stage before"):
        now.server.receive_agree(wire.encode_agree(3, range(4), range(3), identify("c3")))
