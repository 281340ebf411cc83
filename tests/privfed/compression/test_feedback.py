"""Error feedback: nothing is lost, what is sent catches up; and broadcasts through codecs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from loop import CASES, LENGTH, Loop, at, build, declared, stream

from privfed.compression import CODECS, Ring
from privfed.compression.downlink import decode_broadcast, encode_broadcast
from privfed.compression.feedback import corrected, residual
from privfed.compression.message import sum_of_one, to_bytes
from privfed.errors import ClientError, ConfigError, ProtocolError

STATEFUL = [case for case in CASES if declared(case).stateful]
VECTORS = hnp.arrays(np.float32, LENGTH, elements=st.floats(-4, 4, width=32, allow_nan=False))


def vectors(count, seed=1):
    return list(np.random.default_rng(seed).standard_normal((count, LENGTH)).astype(np.float32) / 20)


def test_the_codecs_that_keep_a_residual():
    assert {CASES[case]["name"] for case in STATEFUL} == {
        "top_k", "random_k", "sign", "svd_truncate", "powersgd", "seed_projection",
    }  # fmt: skip


@pytest.mark.parametrize("case", STATEFUL)
@pytest.mark.parametrize("ring", [None, Ring(bits=32, clients=4)], ids=["plain", "ring"])
@given(vector_D=VECTORS)
@settings(max_examples=30, deadline=None)
def test_the_residual_and_what_was_sent_add_up(case, ring, vector_D):
    if ring is not None and not declared(case, True).summable:
        return
    made = at(case, ring)
    if made.properties.second_pass:
        vector_D = vector_D / 8  # so that no projection of it leaves the ring
        encoded = made.encode(vector_D, stream())
        first_M = made.linear_sum(sum_of_one(encoded, made))
        made = made.second(made.between(first_M, LENGTH), LENGTH, first_M)
    encoded = made.encode(vector_D, stream())
    sent_D = made.decode_sum(sum_of_one(encoded, made))
    left_D = residual(made, vector_D, encoded)
    assert left_D.dtype == np.float32
    np.testing.assert_allclose(left_D + sent_D, vector_D, rtol=0, atol=1e-6)
    if made.name in ("top_k", "random_k") and "inner" not in CASES[case] and ring is None:  # sent bit for bit
        assert np.array_equal((left_D + sent_D).astype(np.float32), vector_D)
        assert not (left_D * sent_D).any()


@pytest.mark.parametrize("case", STATEFUL)
def test_over_rounds_everything_is_sent_or_still_kept(case):
    loop, clients = Loop(case), 3
    came = np.zeros(LENGTH)
    for number in range(6):
        updates = vectors(clients, seed=number)
        came += np.sum(updates, axis=0, dtype=np.float64)
        loop.round(updates)
    kept = np.sum(list(loop.residuals.values()), axis=0, dtype=np.float64)
    np.testing.assert_allclose(np.sum(loop.sent, axis=0) + kept, came, atol=1e-5)
    assert np.linalg.norm(kept) > 1e-3


def test_feedback_brings_through_what_is_never_among_the_largest():
    """A constant update with one large value: without a residual the small ones never arrive."""
    update = np.linspace(0.011, 0.009, LENGTH, dtype=np.float32)
    update[:20] = 1.0
    arrived = {}
    for feedback in (True, False):
        loop = Loop({"name": "top_k", "density": 0.1, "error_feedback": feedback})
        arrived[feedback] = sum(loop.round([update]) for _ in range(100))
    assert not arrived[False][38:].any()  # 38 values are sent
    assert np.abs(arrived[True][38:] / 100 - 0.01).max() < 0.005


@pytest.mark.parametrize("case", ["sign, mean", "random_k, feedback", "powersgd", "seed_projection, feedback"])
def test_feedback_under_masking_keeps_what_it_keeps_without(case):
    plain, masked = Loop(case), Loop(case, Ring(bits=32, clients=2))
    for number in range(3):
        for loop in (plain, masked):
            loop.round(vectors(2, seed=number))
    for i in range(2):
        np.testing.assert_allclose(masked.residuals[i], plain.residuals[i], atol=1e-5)


def test_a_residual_of_other_tensors_is_refused_and_none_is_no_change():
    update = vectors(1)[0]
    assert corrected(update, None) is update
    assert corrected(update, update).dtype == np.float32
    with pytest.raises(ClientError, match="residual has 5 values and its update 383"):
        corrected(update, np.zeros(5, dtype=np.float32))


# --- the broadcast ------------------------------------------------------------------------------------------------

DOWN = [case for case in CASES if declared(case).downlink]


def test_the_codecs_that_encode_a_broadcast():
    assert {CASES[case]["name"] for case in DOWN} == {
        "identity", "cast", "stochastic_quantizer", "rotated_quantizer", "top_k", "svd_truncate",
    }  # fmt: skip


@pytest.mark.parametrize("case", DOWN)
def test_every_client_decodes_what_the_server_went_on_from(case):
    change = vectors(1)[0]
    message, decoded_D = encode_broadcast(at(case), change, stream())
    found = decode_broadcast(at(case), message, LENGTH)
    assert found.dtype == np.float32 and found.shape == (LENGTH,)
    assert np.array_equal(found, decoded_D)
    assert len(message) <= 4 * LENGTH + 100
    if case not in ("quantizer, 1 bit", "rotated, 1 bit"):
        assert np.linalg.norm(found - change) < 2.5 * np.linalg.norm(change)
    with pytest.raises(ProtocolError):
        decode_broadcast(at(case), message[:-1], LENGTH)


@pytest.mark.parametrize("case", [case for case in CASES if case not in DOWN])
def test_other_codecs_refuse_a_broadcast_by_name(case):
    made = at(case)
    with pytest.raises(ConfigError, match=f"{made.name!r} cannot encode a broadcast: use 'identity'"):
        encode_broadcast(made, vectors(1)[0], stream())
    with pytest.raises(ConfigError, match="cannot encode a broadcast"):
        decode_broadcast(made, b"", LENGTH)


def test_a_clients_message_is_no_broadcast():
    made = at("identity")
    message = to_bytes(made.encode(vectors(1)[0], stream()), client_id="c", weight=1.0)
    with pytest.raises(ProtocolError, match="is a client's"):
        decode_broadcast(made, message, LENGTH)


# --- the configuration --------------------------------------------------------------------------------------------


def run_config(text):
    import tomllib

    from privfed.config import parse_config

    return parse_config(tomllib.loads(text), where="run.toml")


def table_of(raw):
    """Return the codec's table, whether or not a run's rounds serve the codec yet."""
    return CODECS.get(raw["name"]).config.model_validate(raw)


@pytest.mark.parametrize("case", CASES)
def test_every_case_survives_toml(case):
    import tomllib

    import tomli_w

    found = table_of(CASES[case])
    written = tomli_w.dumps(found.model_dump(exclude_none=True))
    assert table_of(tomllib.loads(written)) == found


def test_a_chain_is_written_by_nesting():
    import tomllib

    found = table_of(
        tomllib.loads('name = "random_k"\ndensity = 0.2\ninner = {name = "stochastic_quantizer", bits = 4}\n')
    )
    made = CODECS.get("random_k").build(found, Ring(bits=32, clients=4))
    assert made.properties.summable and found.inner.bits == 4
    assert made.wire(1000).values == 200


@pytest.mark.parametrize(
    ("inner", "parts"),
    [
        ('{name = "zip"}', ["Unknown codec 'zip'"]),
        ('{bits = 4}', ["compression.inner", "expected a table with a name"]),
        ('"cast"', ["compression.inner", "expected a table with a name"]),
        ('{name = "stochastic_quantizer", bits = 40}', ["compression.inner.bits = 40", "less than or equal to 16"]),
        ('{name = "stochastic_quantizer", bit = 4}', ["Unknown key 'compression.inner.bit'"]),
    ],
)  # fmt: skip
def test_a_bad_nested_codec_is_one_sentence(inner, parts):
    with pytest.raises(ConfigError) as caught:
        run_config(f'[compression]\nname = "random_k"\ninner = {inner}\n')
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("outer", ["random_k", "top_k", "count_sketch", "powersgd", "global_mask", "seed_projection"])
@pytest.mark.parametrize("inner", ["top_k", "count_sketch", "powersgd", "svd_truncate", "global_mask", "sign"])
def test_what_cannot_be_nested_is_refused_by_both_names(outer, inner):
    with pytest.raises(ConfigError, match=f'compression.name = "{outer}" with inner.name = "{inner}".*use '):
        build({"name": outer, "inner": {"name": inner}})


def test_a_nested_codec_of_floats_is_refused_in_a_ring():
    options = {"name": "random_k", "inner": {"name": "cast"}}
    assert not declared(options, True).summable
    with pytest.raises(ConfigError, match=r'compression\.name = "cast" sends floats'):
        build(options, Ring(bits=32, clients=2))
