"""Who trains which tensors, and the weights of tensors in plain and masked sums.

Shape suffixes: D values, K clients, T tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

from privfed.compression import CODECS, Ring
from privfed.compression.message import to_bytes
from privfed.errors import ConfigError, ModelError, ProtocolError
from privfed.federation.collect import MaskedLink, PlainLink
from privfed.federation.layers import block_numbers, deal_layers, moving, over_trained
from privfed.federation.sharing import Selection
from privfed.rng import PrivateStream
from privfed.secagg import Identity, Requirements, ServerSession
from privfed.secagg.ring import READ_AHEAD, add_packed
from privfed.types import ParamLayout, Shard

LAYOUT = ParamLayout(
    names=("m.layer.0.a", "m.layer.1.a", "m.layer.1.b", "head"), shapes=((3,), (2,), (1, 2), (2,)), digest="x"
)
WHOLE = Selection(LAYOUT, LAYOUT.names)


class Model(nn.Module):
    """Two blocks with a linear layer each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Module()
        self.m.layer = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])


def test_each_tensor_is_divided_by_the_weights_of_those_that_trained_it() -> None:
    mean_M, weights_T = np.arange(1.0, 10.0), np.array([2.0, 0.5, 0.0, 4.0])
    found = over_trained(mean_M, 4.0, weights_T, WHOLE)
    np.testing.assert_array_equal(found, [2, 4, 6, 32, 40, 0, 0, 8, 9])
    some = moving(weights_T, WHOLE)
    assert some.names == ("m.layer.0.a", "m.layer.1.a", "head")
    np.testing.assert_array_equal(some.take(mean_M), [1, 2, 3, 4, 5, 8, 9])


def test_groups_are_dealt_out_in_turn_and_what_is_in_no_block_to_all() -> None:
    shards = [Shard(client_id=f"c{number}", indices=np.arange(1)) for number in (2, 0, 1)]
    assert block_numbers(LAYOUT, Model()) == {LAYOUT.names[0]: 0, LAYOUT.names[1]: 1, LAYOUT.names[2]: 1, "head": None}
    dealt = deal_layers([[0], [1, 1]], shards, LAYOUT, Model())
    assert dealt is not None
    assert dealt.by_client == {
        "c0": {"m.layer.0.a", "head"},
        "c1": {"m.layer.1.a", "m.layer.1.b", "head"},
        "c2": {"m.layer.0.a", "head"},
    }
    np.testing.assert_array_equal(dealt.trained("c1", WHOLE), [False, True, True, True])
    np.testing.assert_allclose(dealt.shares(WHOLE), [2 / 3, 1 / 3, 1 / 3, 1])
    assert dealt.refusal(["c0", "c2"], WHOLE, 2) is None  # nobody trained block 1
    assert "1 of these clients trained m.layer.1.a" in str(dealt.refusal(["c0", "c1", "c2"], WHOLE, 2))
    assert deal_layers([], shards, LAYOUT, Model()) is None


@pytest.mark.parametrize(
    ("groups", "words"),
    [([[0, 2]], "block 2.*expected some of"), ([[0]], "block 1 to no client"), ([[0], [0], [0], [1]], "to no client")],
)
def test_blocks_that_are_not_there_or_left_out_are_refused(groups: list[list[int]], words: str) -> None:
    shards = [Shard(client_id=f"c{number}", indices=np.arange(1)) for number in range(3)]
    with pytest.raises(ConfigError, match=words):
        deal_layers(groups, shards, LAYOUT, Model())


def test_a_client_with_nothing_to_train_and_a_model_without_blocks_are_refused() -> None:
    shards = [Shard(client_id=f"c{number}", indices=np.arange(1)) for number in range(3)]
    headless = Selection(LAYOUT, LAYOUT.names[:3]).layout
    with pytest.raises(ConfigError, match="gives c1 nothing to train"):
        deal_layers([[0, 1], []], shards, headless, Model())
    with pytest.raises(ModelError, match="no trained tensor"):
        deal_layers([[0]], shards, Selection(LAYOUT, ["head"]).layout, Model())


# the sums


def _links(weighted: bool, bits: int) -> dict[str, Any]:
    plugin = CODECS.get("identity")
    ring = Ring(bits=bits, clients=5)
    masked = MaskedLink(
        {f"c{number}": Identity.generate() for number in range(5)},
        requirements=Requirements(),
        round_id=b"round",
        config_digest=bytes(32),
        codec="identity",
        length=9,
        weighted=weighted,
        ring_bits=bits,
        tensors=4,
    )
    codecs = {"none": plugin.build(plugin.config(), None), "masked": plugin.build(plugin.config(), ring)}
    return {"none": (codecs["none"], PlainLink(codecs["none"], 9, tensors=4)), "masked": (codecs["masked"], masked)}


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("masking", ["none", "masked"])
def test_the_weights_of_each_tensor_add_up_beside_the_values(masking: str, weighted: bool, bits: int) -> None:
    codec, link = _links(weighted, bits)[masking]
    rng = np.random.default_rng(5)
    flags_KT = rng.random((5, 4)) < 0.5
    weights_K = (rng.integers(1, 65537, 5) / 65536) if weighted else np.ones(5)
    link.open()
    vector_D = np.full(9, 0.5, dtype=np.float32)
    for number in range(5):
        encoded = codec.encode(vector_D, PrivateStream(bytes(32), str(number)))
        link.send(f"c{number}", encoded, float(weights_K[number]), flags_KT[number])
    collected = link.close()
    np.testing.assert_array_equal(collected.weights_T, weights_K @ flags_KT)
    np.testing.assert_allclose(codec.decode_sum(collected.total), 2.5, atol=2e-2 if bits == 16 else 1e-6)


def test_a_masked_message_does_not_say_what_its_client_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the values that the server receives nor the length of the message depend on the flags."""
    messages: list[bytes] = []
    receive = ServerSession.receive_masked

    def listening(server: ServerSession, message: bytes) -> None:
        messages.append(message)
        receive(server, message)

    monkeypatch.setattr(ServerSession, "receive_masked", listening)
    codec, link = _links(False, 32)["masked"]
    link.open()
    flags_KT = np.array([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 1, 1], [0, 0, 1, 1]], dtype=bool)
    for number, flags_T in enumerate(flags_KT):
        encoded = codec.encode(np.zeros(9, dtype=np.float32), PrivateStream(bytes(32), "x"))
        link.send(f"c{number}", encoded, 1.0, flags_T)
    assert len({len(message) for message in messages}) == 1
    for message, flags_T in zip(messages, flags_KT, strict=True):
        got = link._server._wire.decode_masked(message)
        masked_M = np.zeros(13, dtype=np.uint32)
        add_packed(masked_M, message + bytes(READ_AHEAD), got.frame.payload_at, 32)
        assert not (masked_M[9:] == flags_T).any()  # by chance with probability 1e-9
        assert (masked_M[9:] > 1 << 16).any()
    np.testing.assert_array_equal(link.close().weights_T, flags_KT.sum(axis=0))


@pytest.mark.parametrize("trained", [b"", b"\xf0\x00"])
def test_a_message_that_says_it_of_other_tensors_is_refused(trained: bytes) -> None:
    codec, link = _links(False, 32)["none"]
    encoded = codec.encode(np.ones(9, dtype=np.float32), PrivateStream(bytes(32), "x"))
    with pytest.raises(ProtocolError, match="expected 1"):
        link.receive(to_bytes(encoded, client_id="c0", weight=1.0, trained=trained))
    _, masked = _links(False, 32)["masked"]
    with pytest.raises(ProtocolError, match="expected 4"):
        masked.send("c0", encoded, 1.0, np.ones(3, dtype=bool))
    collected = link.close()
    assert collected.survivors == ()
    assert not collected.weights_T.any()
