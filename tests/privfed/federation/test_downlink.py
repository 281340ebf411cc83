"""Broadcasts through a codec, and the messages that carry a codec's state: what clients read is what the server means.

Shape suffixes: D trained values, S shared values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from privfed.compression.state import state_to_bytes
from privfed.errors import ProtocolError
from privfed.federation.messages import Broadcast, Interim

DOWN: dict[str, dict[str, Any]] = {
    "bfloat16": {"name": "cast"},
    "quantizer": {"name": "stochastic_quantizer", "bits": 6, "max_value": 1.0},
    "rotated": {"name": "rotated_quantizer", "bits": 6, "max_norm": 4.0},
    "top_k": {"name": "top_k", "density": 0.1},
    "svd_truncate": {"name": "svd_truncate", "rank": 1},
}
PLAIN = {"privacy": {"unit": "none"}, "secagg": {"name": "none"}, "tuning": {"name": "lora", "r": 4}}


class Heard:
    """A trainer that trains for real and remembers from what."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.from_D: list[Any] = []
        self.delta_D: Any = None

    def run(self, params_D: Any, *rest: Any) -> Any:
        """Train."""
        self.from_D.append(params_D)
        self.delta_D = self.trainer.run(params_D, *rest)
        return self.delta_D


@pytest.mark.parametrize("case", DOWN)
@pytest.mark.parametrize("rule", ["fedavg", "fedsvd", "rolora"])
def test_every_client_trains_from_the_same_decoded_broadcast(
    case: str, rule: str, federation: Callable[..., Any]
) -> None:
    server = {"cohort_size": 4, "aggregation": rule}
    plain = federation(**PLAIN, server=server)
    _, whole = plain.round()
    run = federation(**PLAIN, server=server, downlink=DOWN[case])
    trainers = {name: Heard(run.stage.trainer) for name in run.phase.clients}
    run.trainers(lambda client: trainers[client.shard.client_id])
    for number in (1, 2):
        before = run.state
        after, report = run.round()
        assert (report.survivors, report.dropped) == (4, ())
        read = [each.from_D[-1] for each in trainers.values()]
        assert all(np.array_equal(each, read[0]) for each in read)
        down, sharing = run.phase.downlink, run.phase.sharing
        message, decoded_S = down.encode(sharing.shared.take(before.params_D), "run", "train", number)
        np.testing.assert_array_equal(sharing.shared.take(read[0]), decoded_S)
        assert report.bytes_down == whole.bytes_down + 4 * (len(message) - 4 * decoded_S.size + _longer(before, number))
        if number == 1:
            np.testing.assert_array_equal(read[0], before.params_D)  # nothing has changed since the start
        elif case != "quantizer":
            assert not np.array_equal(read[0], before.params_D)
        if rule == "fedavg":  # the server adds what was learned to its own, exact parameters
            mean_D = np.mean([each.delta_D for each in trainers.values()], axis=0, dtype=np.float64)
            np.testing.assert_allclose(after.params_D, before.params_D + mean_D, atol=1e-7)
    saved = len(message) / (4 * decoded_S.size)
    assert saved < {"bfloat16": 0.53, "quantizer": 0.25, "rotated": 0.4, "top_k": 0.2, "svd_truncate": 0.7}[case]


def _longer(state: Any, number: int) -> int:
    """Return by how many bytes the header of an encoded broadcast is longer: two numbers more."""

    def header(packed: bytes | None) -> int:
        sent = Broadcast(run_id="r", phase="p", round=number, layout_digest="", params_D=np.empty(0, np.float32))
        return len(replace(sent, packed=packed).to_bytes()) - len(packed or b"")

    return header(bytes(1000)) - header(None)


def test_the_error_of_one_broadcast_is_not_carried_into_the_next(federation: Callable[..., Any], given: Any) -> None:
    """Updates are constant, so the exact parameters are known; a lossy broadcast leaves no trace in them."""
    run = federation(**PLAIN, server={"cohort_size": 4, "rounds": 9}, downlink={"name": "top_k", "density": 0.01})
    start = run.state.params_D
    update = np.random.default_rng(1).standard_normal(start.size).astype(np.float32) / 100
    run.trainers(lambda client: given(update))
    for _ in range(9):
        run.round()
    np.testing.assert_allclose(run.state.params_D, start + 9 * update, rtol=1e-5, atol=1e-6)


def test_rules_read_what_clients_made_of_what_they_were_sent(federation: Callable[..., Any], recorded: Any) -> None:
    """FLoRA stacks the clients' own factors: decoded start and update, not the server's exact start."""
    tables = {**PLAIN, "server": {"cohort_size": 4, "aggregation": "flexlora"}}
    run = federation(**tables, downlink={"name": "top_k", "density": 0.02})
    seen: list[Any] = []
    rule, step = type(run.phase.sharing.rule), run.phase.sharing.rule.step

    def watching(_rule: Any, before: Any, averaged: Any, contributions: Any, setting: Any) -> Any:
        seen.append(contributions)
        return step(before, averaged, contributions, setting)

    trainers = {name: Heard(run.stage.trainer) for name in run.phase.clients}
    run.trainers(lambda client: trainers[client.shard.client_id])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rule, "step", watching)
        run.round()
        run.round()
    layout = run.phase.layout
    for contribution, trainer in zip(seen[-1], trainers.values(), strict=True):
        ended = trainer.from_D[-1] + trainer.delta_D
        flat = np.concatenate([np.ravel(contribution.tensors[name]) for name in layout.names])
        np.testing.assert_allclose(flat, ended, atol=1e-6)


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_private_run_goes_on_from_a_checkpoint_through_the_downlink(
    unit: str, federation: Callable[..., Any]
) -> None:
    tables = {
        **PLAIN,
        "privacy": {"unit": unit},
        "server": {"cohort_size": 4, "rounds": 3},
        "downlink": DOWN["quantizer"],
        "compression": {"name": "random_k", "density": 0.5},
    }
    unbroken = federation(**tables)
    states = [unbroken.round()[0] for _ in range(3)]
    charged = unbroken.holder.ledger.head()
    resumed = federation(**tables)
    resumed.state = states[0]
    for wanted in states[1:]:
        assert resumed.round()[0].params_D.tobytes() == wanted.params_D.tobytes()
    assert resumed.holder.ledger.head() == charged


@pytest.mark.parametrize("coded", [True, False])
def test_a_client_refuses_parameters_in_another_form_than_configured(
    coded: bool, federation: Callable[..., Any]
) -> None:
    run = federation(**PLAIN, **({} if coded else {"downlink": DOWN["bfloat16"]}))
    client = next(iter(run.phase.clients.values()))
    sent = Broadcast(
        run_id="run",
        phase="train",
        round=1,
        layout_digest=run.phase.layout.digest,
        params_D=run.state.params_D,
        packed=b"x" if coded else None,
    )
    with pytest.raises(ProtocolError, match=r"\[downlink\]"):
        client.respond(sent.to_bytes(), lambda *_: None)


# the messages


def _coded(**changes: Any) -> Broadcast:
    sent = Broadcast(
        run_id="r",
        phase="train",
        round=3,
        layout_digest="d" * 64,
        params_D=np.arange(4, dtype=np.float32),
        carried={"w": np.ones((2, 3), dtype=np.float32)},
        terms=(0.5,),
        codec={
            "mask": np.array([3, 255], dtype=np.uint8),
            "age": np.array([7], dtype=np.int64),
            "right": np.array([[0.5, -0.0]], dtype=np.float32),
            "none": np.zeros(0, dtype=np.float32),
        },
    )
    return replace(sent, **changes)


@pytest.mark.parametrize("packed", [None, b"", b"any bytes"])
def test_typed_arrays_and_encoded_parameters_come_back(packed: bytes | None) -> None:
    sent = _coded(packed=packed)
    found = Broadcast.from_bytes(sent.to_bytes(), size=4)
    assert found.packed == packed
    np.testing.assert_array_equal(found.params_D, sent.params_D if packed is None else [])
    np.testing.assert_array_equal(found.carried["w"], sent.carried["w"])
    assert found.terms == (0.5,)
    assert found.codec.keys() == sent.codec.keys()
    for name, values in sent.codec.items():
        assert found.codec[name].dtype == values.dtype and found.codec[name].shape == values.shape
        assert found.codec[name].tobytes() == values.tobytes()
    assert "array" not in repr(found)


def test_a_broadcast_without_either_is_the_message_it_was() -> None:
    """Noise derives from its bytes: what plain runs draw must not change."""
    header = msgpack.packb([2, "r", "train", 3, "d" * 64, [["w", [2, 3]]], [0.5]])
    sent = _coded(codec={})
    payload = sent.params_D.astype("<f4").tobytes() + sent.carried["w"].astype("<f4").tobytes()
    assert sent.to_bytes() == len(header).to_bytes(2, "little") + header + payload


def _headed(fields: list[Any], rest: bytes) -> bytes:
    header = msgpack.packb(fields)
    return len(header).to_bytes(2, "little") + header + rest


STATE = state_to_bytes({"mask": np.array([1], dtype=np.uint8)})
KNOWN = ["r", "train", 3, "d" * 64]
PARAMS = bytes(16)


@pytest.mark.parametrize(
    "message",
    [
        _headed([4, *KNOWN, [], [], -1, len(STATE)], PARAMS + STATE),
        _headed([3, *KNOWN, [], [], -1], PARAMS),
        _headed([3, *KNOWN, [], [], -1, len(STATE)], PARAMS + STATE[:-1]),
        _headed([3, *KNOWN, [], [], -1, len(STATE)], PARAMS + STATE[:-1] + b"\x01\x02"),
        _headed([3, *KNOWN, [], [], -1, 5], PARAMS + b"12345"),
        _headed([3, *KNOWN, [], [], -2, len(STATE)], PARAMS + STATE),
        _headed([3, *KNOWN, [], [], "x", len(STATE)], PARAMS + STATE),
        _headed([3, *KNOWN, [], [], 16, -1], PARAMS),
        _headed([3, *KNOWN, [], [], 17, 0], PARAMS),
        _headed([3, *KNOWN, [], [], True, 0], b"x"),
        _headed([3, *KNOWN, [["w", [-1]], ["v", [1]]], [], -1, 0], PARAMS),
        _headed([3, *KNOWN, [["w", ["x"]]], [], -1, 0], PARAMS),
        _headed([3, *KNOWN, [[["w"], [0]]], [], -1, 0], PARAMS),
        _headed([3, *KNOWN, 7, [], -1, 0], PARAMS),
        _headed([3, *KNOWN, [], [float("nan")], -1, 0], PARAMS),
        _headed([3, 5, *KNOWN[1:], [], [], -1, 0], PARAMS),
        _headed([3, "r", "train", "3", "d" * 64, [], [], -1, 0], PARAMS),
    ],
)  # fmt: skip
def test_a_forged_broadcast_is_refused(message: bytes) -> None:
    Broadcast.from_bytes(_headed([3, *KNOWN, [], [], -1, len(STATE)], PARAMS + STATE), size=4)
    with pytest.raises(ProtocolError):
        Broadcast.from_bytes(message, size=4)


@drawn(data=st.data())
def test_a_broadcast_cut_anywhere_is_refused(data: st.DataObject) -> None:
    whole = _coded().to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ProtocolError):
        Broadcast.from_bytes(whole[:at], size=4)


def test_what_lies_between_the_passes_is_of_one_round() -> None:
    sent = Interim(phase="train", round=2, values=np.array([0.5, -1.0], dtype=np.float32))
    found = Interim.from_bytes(sent.to_bytes(), phase="train", round_number=2)
    np.testing.assert_array_equal(found.values, sent.values)
    for phase, number in (("train", 3), ("warm_start", 2)):
        with pytest.raises(ProtocolError, match=r"is of round 2 of 'train'"):
            Interim.from_bytes(sent.to_bytes(), phase=phase, round_number=number)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, "train", 2]),
        msgpack.packb([2, "train", 2, state_to_bytes({"values": np.zeros(2, dtype=np.float32)})]),
        msgpack.packb([1, "train", 2, "text"]),
        msgpack.packb([1, "train", 2, state_to_bytes({})]),
        msgpack.packb([1, "train", 2, state_to_bytes({"values": np.zeros((1, 2), dtype=np.float32)})]),
        msgpack.packb([1, "train", 2, state_to_bytes({"values": np.zeros(2, dtype=np.float64)})]),
        msgpack.packb([1, "train", 2, b"\xc1"]),
    ],
)
def test_a_forged_message_between_the_passes_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        Interim.from_bytes(message, phase="train", round_number=2)


def test_directions_that_are_not_orthonormal_drop_the_client(federation: Callable[..., Any]) -> None:
    """The bound on the second pass rests on them."""
    run = federation(**PLAIN, compression={"name": "powersgd", "rank": 1}, server={"cohort_size": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interim, "to_bytes", _doubled(Interim.to_bytes))
        _, report = run.round()
    assert report.lost == "no client survived"
    assert {reason.partition(":")[0] for _, reason in report.dropped} == {"ProtocolError"}
    assert "not orthonormal" in report.dropped[0][1]


def _doubled(to_bytes: Callable[[Interim], bytes]) -> Callable[[Interim], bytes]:
    def doubled(told: Interim) -> bytes:
        found: bytes = to_bytes(replace(told, values=2 * told.values))
        return found

    return doubled
