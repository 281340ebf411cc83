"""The masked sum is the plain sum, whoever drops whenever."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.errors import SecAggError, ThresholdError
from privfed.secagg import default_threshold
from privfed.secagg.keystream import BLOCK_BYTES

EDGE = BLOCK_BYTES // 4
LENGTHS = st.sampled_from([0, 1, 2, 7, 64, EDGE - 1, EDGE, EDGE + 1])


@given(data=st.data(), n=st.integers(2, 8), length=LENGTHS)
@settings(deadline=None, max_examples=60)
def test_any_drop_schedule_gives_the_plain_sum_or_a_threshold_error(
    make_params: Any, make_drive: Any, plain_sum: Any, data: st.DataObject, n: int, length: int
) -> None:
    threshold = data.draw(st.integers(max(2, n // 2 + 1), n), label="threshold")
    params = make_params(n, threshold, length)
    last = st.sampled_from([4, 4, 4, 3, 2, 1, 0])
    drops = {client: data.draw(last, label=client) for client in params.clients}
    drive = make_drive(params, drops=drops)
    if sum(stage == 4 for stage in drops.values()) < threshold:
        with pytest.raises(ThresholdError):
            drive.run()
        return
    total, survivors = drive.run()
    assert not drive.refused
    assert survivors == tuple(client for client in params.clients if drops[client] >= 3)
    assert total.dtype == np.uint32 and total.shape == (length,)
    assert np.array_equal(total, plain_sum(drive.vectors, survivors))


def test_more_answers_than_the_threshold_are_fine(make_params: Any, make_drive: Any, plain_sum: Any) -> None:
    params = make_params(20, default_threshold(20), 1001)
    drive = make_drive(params, drops={"c10": 0, "c3": 1, "c7": 2, "c19": 2, "c5": 3})
    total, survivors = drive.run()
    assert len(survivors) == 16
    assert np.array_equal(total, plain_sum(drive.vectors, survivors))


def test_the_input_is_not_changed_and_may_be_strided(make_params: Any, make_drive: Any, plain_sum: Any) -> None:
    params = make_params()
    base = np.arange(30, dtype=np.uint32).reshape(3, 10)
    vectors = {client: base[i, ::2] for i, client in enumerate(params.clients)}
    before = base.copy()
    total, survivors = make_drive(params, vectors).run()
    assert np.array_equal(total, plain_sum(vectors, survivors)) and np.array_equal(base, before)


def test_wrong_values_are_refused_and_the_call_may_be_repeated(make_params: Any, at_stage: Any) -> None:
    now = at_stage(make_params(), "shares")
    for values in (np.zeros(4, np.uint32), np.zeros(5, np.float32), [0] * 5, np.zeros((5, 1), np.uint32)):
        with pytest.raises(SecAggError):
            now.clients["c0"].masked_input(now.shares["c0"], values)
    message = now.clients["c0"].masked_input(now.shares["c0"], now.vectors["c0"])
    assert now.server.receive_masked(message) == "c0"
