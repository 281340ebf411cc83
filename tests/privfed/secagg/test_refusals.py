"""Messages and calls out of order, repeated, foreign, altered or too few end in a typed error."""

from __future__ import annotations

import copy
import pickle
import zlib
from typing import Any

import numpy as np
import pytest

from privfed.errors import ProtocolError, SecAggError, ThresholdError
from privfed.secagg import ClientSession, ServerSession
from privfed.secagg.frame import CHECKSUM, HEADER
from privfed.secagg.wire import Wire, ids_digest

STAGES = ["advertise", "roster", "share", "shares", "masked", "survivors", "unmask"]
TO_SERVER = {
    "advertise": ServerSession.receive_advertise,
    "share": ServerSession.receive_share,
    "masked": ServerSession.receive_masked,
    "unmask": ServerSession.receive_unmask,
}


def to_client(client: ClientSession, stage: str, message: bytes) -> bytes:
    if stage == "roster":
        return client.share(message)
    if stage == "shares":
        return client.masked_input(message, np.zeros(5, np.uint32))
    return client.unmask(message)


def deliver(now: Any, stage: str, message: bytes) -> None:
    """Deliver a message of this stage that comes from, or goes to, client c0."""
    if stage in TO_SERVER:
        TO_SERVER[stage](now.server, message)
    else:
        to_client(now.clients["c0"], stage, message)


def message_of(now: Any, stage: str) -> bytes:
    messages = getattr(now, stage)
    return messages if isinstance(messages, bytes) else messages["c0"]


def with_new_checksum(message: bytes) -> bytes:
    """Return the message as an attacker would send it: altered, with a checksum that fits."""
    return message[: -CHECKSUM.size] + CHECKSUM.pack(zlib.crc32(message[: -CHECKSUM.size]))


@pytest.mark.parametrize("stage", STAGES)
def test_every_damaged_byte_is_refused_and_the_true_message_still_counts(
    make_params: Any, at_stage: Any, stage: str
) -> None:
    now = at_stage(make_params(), stage)
    message = message_of(now, stage)
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
    released = 0
    for i in range(size - CHECKSUM.size):

        def tamper(at: str, client: str, message: bytes, i: int = i) -> bytes:
            if (at, client) != (stage, "c1"):
                return message
            flip = 1 << (i % 8)
            return with_new_checksum(message[:i] + bytes([message[i] ^ flip]) + message[i + 1 :])

        drive = make_drive(params, tamper=tamper)
        try:
            total, survivors = drive.run()
        except SecAggError:
            continue
        assert drive.refused, f"byte {i} of {stage} went unnoticed"
        assert np.array_equal(total, plain_sum(drive.vectors, survivors)), f"byte {i} of {stage}"
        released += 1
    assert released >= HEADER.size  # a bad header costs one client, not the round


@pytest.mark.parametrize("stage", STAGES)
def test_cut_longer_and_foreign_messages_are_refused(make_params: Any, at_stage: Any, stage: str) -> None:
    now = at_stage(make_params(), stage)
    message = message_of(now, stage)
    strangers = [
        make_params(round_id=b"round-2"),
        make_params(config_digest=b"x" * 32),
        make_params(threshold=3),
        make_params(length=6),
        make_params(clients=("c0", "c1", "c3")),
    ]
    foreign = [message_of(at_stage(params, stage), stage) for params in strangers]
    for bad in [b"", message[:30], message[:-1], message + b"\0", b"\xff" * 500, None, 7, "text", *foreign]:
        with pytest.raises(ProtocolError):
            deliver(now, stage, bad)  # type: ignore[arg-type]
    deliver(now, stage, message)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("other", STAGES)
def test_a_message_serves_its_own_stage_once(make_params: Any, at_stage: Any, stage: str, other: str) -> None:
    now = at_stage(make_params(), stage)
    wrong = message_of(at_stage(make_params(), other), other)
    if other != stage:
        with pytest.raises(ProtocolError):
            deliver(now, stage, wrong)
    if STAGES.index(other) - STAGES.index(stage) not in (
        0,
        1,
    ):  # the receiver of the next stage may be waiting
        with pytest.raises(ProtocolError):
            deliver(now, other, wrong)
    message = message_of(now, stage)
    deliver(now, stage, message)
    with pytest.raises(ProtocolError):
        deliver(now, stage, message)


def test_client_calls_out_of_order_are_refused(make_params: Any, at_stage: Any) -> None:
    params = make_params()
    now = at_stage(params, "unmask")
    values = np.zeros(5, np.uint32)

    def calls(client: ClientSession) -> dict[str, Any]:
        return {
            "advertise": client.advertise,
            "share": lambda: client.share(now.roster),
            "mask": lambda: client.masked_input(now.shares["c0"], values),
            "unmask": lambda: client.unmask(now.survivors),
        }

    for name in ("share", "mask", "unmask"):
        with pytest.raises(ProtocolError, match="NEW"):
            calls(ClientSession(params, "c0"))[name]()
    for call in calls(now.clients["c0"]).values():
        with pytest.raises(ProtocolError, match="DONE"):
            call()


def test_server_calls_out_of_order_are_refused(make_params: Any, at_stage: Any) -> None:
    params = make_params()
    server = ServerSession(params)
    for call in (lambda: server.shares_for("c0"), server.survivors, server.sum):
        with pytest.raises(ProtocolError, match="ADVERTISE"):
            call()
    now = at_stage(params, "unmask")
    for c in params.clients:
        now.server.receive_unmask(now.unmask[c])
    now.server.sum()
    for call in (
        now.server.roster,
        lambda: now.server.shares_for("c0"),
        now.server.survivors,
        now.server.sum,
    ):
        with pytest.raises(ProtocolError, match="DONE"):
            call()
    assert "DONE" in repr(now.server)


def test_the_server_refuses_to_go_on_below_the_threshold_and_may_wait(
    make_params: Any, random_vectors: Any, plain_sum: Any
) -> None:
    params = make_params(4, 3, 5)
    vectors = random_vectors(params)
    server, clients = ServerSession(params), [ClientSession(params, c) for c in params.clients]

    def stage(messages: list[bytes], receive: Any, close: Any) -> Any:
        for message in messages[:2]:
            receive(message)
        with pytest.raises(ThresholdError, match="threshold is 3"):
            close()
        receive(messages[2])
        return close()

    clients = clients[:3]
    roster = stage([c.advertise() for c in clients], server.receive_advertise, server.roster)
    stage([c.share(roster) for c in clients], server.receive_share, lambda: server.shares_for("c0"))
    with pytest.raises(ProtocolError, match="did not share"):
        server.shares_for("c3")
    masked = [c.masked_input(server.shares_for(i), vectors[i]) for c, i in zip(clients, params.clients, strict=False)]
    survivors = stage(masked, server.receive_masked, server.survivors)
    total, names = stage([c.unmask(survivors) for c in clients], server.receive_unmask, server.sum)
    assert np.array_equal(total, plain_sum(vectors, names)) and names == ("c0", "c1", "c2")


def test_a_client_refuses_to_go_on_below_the_threshold(make_params: Any, at_stage: Any) -> None:
    params = make_params(4, 3, 5)
    wire = Wire(params)
    now = at_stage(params, "roster")
    roster = wire.decode_roster(now.roster)
    with pytest.raises(ThresholdError, match="advertised"):
        now.clients["c0"].share(wire.encode_roster({c: roster[c] for c in ("c0", "c1")}))
    now = at_stage(params, "shares")
    _, sealed = wire.decode_shares(now.shares["c0"])
    with pytest.raises(ThresholdError, match="shared"):
        now.clients["c0"].masked_input(wire.encode_shares("c0", {"c1": sealed["c1"]}), np.zeros(5, np.uint32))
    now = at_stage(params, "survivors")
    with pytest.raises(ThresholdError, match="survived"):
        now.clients["c0"].unmask(wire.encode_survivors(["c0", "c1"]))
    with pytest.raises(ProtocolError):  # and a second try is not answered either
        now.clients["c0"].unmask(now.survivors)


def test_a_client_refuses_survivors_it_cannot_know(make_params: Any, make_drive: Any) -> None:
    params = make_params(4, 2 + 1, 5)
    wire = Wire(params)
    for names, reason in [(["c0", "c1", "c3"], "never shared"), (["c1", "c2", "c3"], "never shared")]:
        drive = make_drive(
            params,
            drops={"c3": 1},
            tamper=lambda s, c, m, n=names: wire.encode_survivors(n) if s == "survivors" else m,
        )
        with pytest.raises(ThresholdError):
            drive.run()
        assert all(reason in str(error) for error in drive.refused) and len(drive.refused) == 3
    foreign = Wire(make_params(4, 3, 5, clients=("c0", "c1", "c2", "zz")))
    foreign._context = wire._context
    now = make_drive(
        params, tamper=lambda s, c, m: foreign.encode_survivors(["c0", "c1", "zz"]) if s == "survivors" else m
    )
    with pytest.raises(ThresholdError):
        now.run()
    assert all("cohort" in str(error) for error in now.refused) and len(now.refused) == 4


def test_a_client_left_out_of_the_sum_does_not_answer(make_params: Any, at_stage: Any) -> None:
    params = make_params(4, 3, 5)
    now = at_stage(params, "survivors")
    with pytest.raises(ProtocolError, match="out of the sum"):
        now.clients["c0"].unmask(Wire(params).encode_survivors(["c1", "c2", "c3"]))


def test_a_swapped_key_stops_the_owner_and_a_split_roster_stops_the_server(make_params: Any, at_stage: Any) -> None:
    params = make_params()
    wire = Wire(params)
    now, other = at_stage(params, "roster"), at_stage(params, "roster")
    roster, fakes = wire.decode_roster(now.roster), wire.decode_roster(other.roster)
    forged = wire.encode_roster({**roster, "c2": fakes["c2"]})
    with pytest.raises(ProtocolError, match="does not have the keys"):
        now.clients["c2"].share(forged)
    with pytest.raises(ProtocolError, match="roster that this server did not send"):
        now.server.receive_share(now.clients["c0"].share(forged))


def test_shares_are_opened_by_their_recipient_under_one_roster_only(make_params: Any, at_stage: Any) -> None:
    params = make_params()
    wire = Wire(params)
    now = at_stage(params, "shares")
    with pytest.raises(ProtocolError, match="for client 'c1'"):
        now.clients["c0"].masked_input(now.shares["c1"], np.zeros(5, np.uint32))
    _, mine = wire.decode_shares(now.shares["c0"])
    swapped = {"c1": mine["c2"], "c2": mine["c1"]}
    with pytest.raises(ProtocolError, match="not authentic"):
        now.clients["c0"].masked_input(wire.encode_shares("c0", swapped), np.zeros(5, np.uint32))
    with pytest.raises(ProtocolError, match="not on the roster"):
        now.clients["c1"].masked_input(
            wire.encode_shares("c1", {**mine, "c0": mine["c1"]} | {"c1": mine["c2"]}), np.zeros(5, np.uint32)
        )


def test_shares_sealed_under_another_roster_do_not_open(make_params: Any, at_stage: Any) -> None:
    params = make_params()
    wire = Wire(params)
    now, other = at_stage(params, "roster"), at_stage(params, "roster")
    roster, fakes = wire.decode_roster(now.roster), wire.decode_roster(other.roster)
    split = now.clients["c0"].share(wire.encode_roster({**roster, "c2": fakes["c2"]}))
    true = {c: now.clients[c].share(now.roster) for c in ("c1", "c2")}
    sealed = {"c0": wire.decode_share(split)[2]["c1"], "c2": wire.decode_share(true["c2"])[2]["c1"]}
    with pytest.raises(ProtocolError, match="from client 'c0' are not authentic"):
        now.clients["c1"].masked_input(wire.encode_shares("c1", sealed), np.zeros(5, np.uint32))


def test_masking_against_other_clients_is_noticed(make_params: Any, at_stage: Any) -> None:
    params = make_params()
    wire = Wire(params)
    now = at_stage(params, "shares")
    _, mine = wire.decode_shares(now.shares["c0"])
    fewer = wire.encode_shares("c0", {"c1": mine["c1"]})
    with pytest.raises(ProtocolError, match="masked against other clients"):
        now.server.receive_masked(now.clients["c0"].masked_input(fewer, np.zeros(5, np.uint32)))


def test_a_forged_masked_vector_costs_the_round_not_the_truth(make_params: Any, make_drive: Any) -> None:
    params = make_params()
    wire = Wire(params)

    def forge(stage: str, client: str, message: bytes) -> bytes:
        if (stage, client) != ("masked", "c1"):
            return message
        sender, digest, tag, masked_M = wire.decode_masked(message)
        assert digest == ids_digest(params.clients)
        return wire.encode_masked(sender, digest, tag, masked_M + np.uint32(1))

    with pytest.raises(ProtocolError, match="'c1'"):
        make_drive(params, tamper=forge).run()


@pytest.mark.parametrize("kind", ["seed_shares", "key_shares"])
def test_a_lying_share_is_noticed_and_names_whose_secret(make_params: Any, make_drive: Any, kind: str) -> None:
    params = make_params(4, 3, 5)
    wire = Wire(params)
    victim, what = {"seed_shares": ("c1", "self-mask seed"), "key_shares": ("c3", "masking key")}[kind]

    def lie(stage: str, client: str, message: bytes) -> bytes:
        if (stage, client) != ("unmask", "c0"):
            return message
        sender, reveal = wire.decode_unmask(message)
        getattr(reveal, kind)[victim] = bytes(33)
        return wire.encode_unmask(sender, reveal)

    with pytest.raises(ProtocolError, match=f"shares of client '{victim}' do not give the {what}"):
        make_drive(params, drops={"c3": 2}, tamper=lie).run()


def test_copied_and_degenerate_keys_are_refused_and_the_rest_go_on(make_params: Any) -> None:
    params = make_params()
    wire = Wire(params)
    server = ServerSession(params)
    message = ClientSession(params, "c0").advertise()
    _, public = wire.decode_advertise(message)
    server.receive_advertise(message)
    with pytest.raises(ProtocolError, match="another client uses"):
        server.receive_advertise(wire.encode_advertise("c1", public))
    weak = type(public)(masking=bytes(32), channel=b"c" * 32, seed_commitment=bytes(32))
    with pytest.raises(ProtocolError, match="degenerate"):
        server.receive_advertise(wire.encode_advertise("c1", weak))
    with pytest.raises(ProtocolError, match="occurs twice"):
        wire.decode_roster(wire.encode_roster({"c0": public, "c1": public}))
    assert server.receive_advertise(ClientSession(params, "c1").advertise()) == "c1"


def test_a_client_session_is_never_copied_or_stored(make_params: Any) -> None:
    session = ClientSession(make_params(), "c0")
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ProtocolError, match="cannot be copied"):
            duplicate(session)
