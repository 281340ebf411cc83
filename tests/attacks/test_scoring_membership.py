"""The scorer of membership attacks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtr

from privfed.errors import ConfigError
from privfed.types import PrivacyEvent
from privfed_attacks.roc import accounted
from privfed_attacks.scoring_membership import score_membership
from privfed_attacks.sealed import Sealed


def trials(seed, mu, each):
    members = np.arange(2 * each) % 2 == 0
    return np.random.default_rng(seed).standard_normal(2 * each) + mu * members, Sealed(members)


def test_a_score_has_the_curve_its_rates_and_what_is_accounted():
    claim = accounted([PrivacyEvent(unit="example", noise_multiplier=1.0, sampling_probability=1.0, steps=1)])
    found = score_membership(
        *trials(1, 1.0, 3000), calibration=trials(2, 1.0, 3000), rng=np.random.default_rng(0), accounted=claim
    )
    assert found.auc.low < ndtr(1 / np.sqrt(2)) < found.auc.high
    assert found.auc.value == pytest.approx(found.roc.auc)
    assert [rate.wanted_fpr for rate in found.rates] == [0.01, 0.1]
    assert found.left_out == (0.001,)  # too few non-members for it
    assert found.above == 0
    leaky = score_membership(
        *trials(3, 2.0, 3000), calibration=trials(4, 2.0, 3000), rng=np.random.default_rng(0), accounted=claim
    )
    assert leaky.above > 0


def test_bits_that_do_not_fit_are_refused():
    scores, truth = trials(1, 1.0, 100)
    with pytest.raises(ConfigError, match="one sealed bit"):
        score_membership(scores[:10], truth, calibration=(scores, truth), rng=np.random.default_rng(0))
