"""Min-K% Prob against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from privfed.errors import ConfigError
from privfed_attacks.membership import MEMBERSHIP, Evidence
from privfed_attacks.membership.min_k_prob import min_k_prob


def test_it_is_the_mean_of_the_lowest_share_of_each_text():
    texts = np.array([[-1.0, -9.0, -3.0, -5.0, -2.0], [-4.0, -0.5, np.nan, np.nan, np.nan]])
    np.testing.assert_allclose(min_k_prob(texts, share=0.4), [-7.0, -4.0])  # 2 of 5; 1 of 2, at the least
    np.testing.assert_allclose(min_k_prob(texts, share=1.0), [-4.0, -2.25])
    found = MEMBERSHIP.get("min_k_prob").score(Evidence(token_logprobs_QT=texts), share=0.4)
    np.testing.assert_allclose(found, [-7.0, -4.0])


def test_wrong_input_is_said():
    with pytest.raises(ConfigError, match="Text 1 has no token"):
        min_k_prob(np.array([[-1.0], [np.nan]]))
    with pytest.raises(ConfigError, match="share of tokens"):
        min_k_prob(np.array([[-1.0]]), share=1.5)
