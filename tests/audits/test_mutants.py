"""Every planted bug is caught at a claimed epsilon of 2, and the correct build is not; a benchmark repeats it."""

from __future__ import annotations

import pytest

from privfed.federation.local import LocalTrainer
from privfed.privacy.per_example import engine
from privfed_audits.mutant_audits import AUDITS, Size, rejections
from privfed_audits.mutants import MUTANTS

EPSILON = 2.0
SIZE = Size(canaries=3000, rounds=4, lonely=260, lonely_rounds=12)
WANTED = {
    "half_the_noise",
    "no_clipping",
    "batch_clipped",
    "noise_reused",
    "noise_once_per_epoch",
    "wrong_sampling_rate",
    "noise_of_a_mean",
    "clip_after_aggregation",
    "head_not_clipped",
    "head_not_noised",
    "microbatches_clipped_as_one",
    "empty_batch_skipped",
}


def test_the_list_is_whole():
    assert set(MUTANTS) == WANTED
    assert {mutant.audit for mutant in MUTANTS.values()} == set(AUDITS)


@pytest.mark.parametrize("name", sorted(WANTED))
def test_a_planted_bug_is_caught(name):
    mutant = MUTANTS[name]
    with mutant.planted():
        (found,) = rejections(mutant.audit, epsilon=EPSILON, size=SIZE, seeds=[1])
    assert found.rejected, found


@pytest.mark.parametrize("audit", sorted(AUDITS))
def test_the_correct_build_is_not(audit):
    (found,) = rejections(audit, epsilon=EPSILON, size=SIZE, seeds=[1])
    assert not found.rejected, found
    assert found.epsilon < EPSILON


def test_nothing_of_a_bug_stays_behind():
    before = (LocalTrainer._private_gradient, LocalTrainer._clipped_sum, engine.clip)
    for mutant in MUTANTS.values():
        with pytest.raises(KeyError), mutant.planted():
            raise KeyError
    assert (LocalTrainer._private_gradient, LocalTrainer._clipped_sum, engine.clip) == before
