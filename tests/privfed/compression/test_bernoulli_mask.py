"""Draws of a mask: their chances, what the server makes of them, and what the sum of them shows."""

from __future__ import annotations

import numpy as np
import pytest
from loop import GIVEN_D, LENGTH, NAMES, SHAPES, at, build, context, linear, stream, total_of

from privfed.compression import RoundContext
from privfed.compression.message import to_bytes
from privfed.errors import ConfigError

CODEC = {"name": "bernoulli_mask", "max_value": 4.0}
SCORES = np.repeat([name.endswith(".scores") for name in NAMES], [int(np.prod(shape)) for shape in SHAPES])
DRAWS = 3000


def sigmoid(values):
    return 1 / (1 + np.exp(-np.asarray(values, dtype=np.float64)))


def only_scores(count, given_D=None, **options):
    """Return a codec for a round in which only ``count`` scores are sent."""
    given_D = np.zeros(count, dtype=np.float32) if given_D is None else given_D
    shared = {"run_seed": bytes(32), "round_seed": bytes(32), "shapes": ((count,),), "names": ("a.scores",)}
    return build({**CODEC, **options}).at(RoundContext(**shared, given_D=given_D))


def test_each_place_is_drawn_with_the_chance_of_its_trained_score():
    """The change counts from what the server had broadcast; another chance would be told apart."""
    change_D = np.random.default_rng(2).standard_normal(LENGTH).astype(np.float32)
    made = at(CODEC)
    found = np.mean([linear(made, change_D, None, n)[SCORES] for n in range(DRAWS)], axis=0) + 0.5
    chances = sigmoid(GIVEN_D + change_D)[SCORES]

    def z_scores(wanted):
        return (found - wanted) / np.sqrt(wanted * (1 - wanted) / DRAWS)

    z = z_scores(chances)
    assert np.abs(z).max() < 5 and 0.85 < z.std() < 1.15
    for wrong in (change_D, GIVEN_D, GIVEN_D + 0.67 * change_D):
        assert np.abs(z_scores(sigmoid(wrong)[SCORES])).max() > 5


def test_places_and_clients_are_drawn_independently():
    made, zeros = only_scores(20_000), np.zeros(20_000, dtype=np.float32)
    one, other = (2 * linear(made, zeros, None, name) for name in ("ann", "bob"))
    for shifted in (other, np.roll(one, 1), np.roll(one, 7)):
        assert abs(float((one * shifted).mean())) < 5 / 20_000**0.5
    assert abs(float(one.mean())) < 5 / 20_000**0.5


def test_a_score_travels_as_one_bit():
    made = only_scores(8000)
    message = to_bytes(made.encode(np.zeros(8000, dtype=np.float32), stream()), client_id="c", weight=1.0)
    assert 1000 <= len(message) < 1060
    plain = int((~SCORES).sum())
    assert at(CODEC).wire(LENGTH).values == int(SCORES.sum()) + 8 * plain


def test_the_other_values_are_what_the_quantizer_sends():
    vector_D = (GIVEN_D[::-1] / 2).copy()
    for bits in (1, 2, 8, 16):
        made = at({**CODEC, "bits": bits})
        step = 4.0 / max(1, 2 ** (bits - 1) - 1)
        found = linear(made, vector_D)[~SCORES]
        assert np.abs(found - vector_D[~SCORES]).max() < (2 if bits == 1 else 1) * step * 1.01
        several = [made.encode(vector_D, stream(n)) for n in range(400)]
        mean = made.linear_sum(total_of(made, several, None))[~SCORES] / 400
        assert np.abs(mean - vector_D[~SCORES]).max() < 6 * 2 * step / 400**0.5


def test_the_servers_scores_are_the_log_odds_of_the_mean_mask():
    made, mean_D = at(CODEC), np.random.default_rng(1).uniform(-0.4, 0.4, LENGTH)
    found_D, state = made.expand(mean_D, {}, LENGTH)
    assert state == {}
    np.testing.assert_allclose(sigmoid(GIVEN_D + found_D)[SCORES], mean_D[SCORES] + 0.5, atol=1e-7)
    assert np.array_equal(found_D[~SCORES], mean_D[~SCORES])


@pytest.mark.parametrize("unanimous", [-0.5, 0.5, -7.0, 7.0])
def test_chances_keep_their_distance_from_certainty_whatever_the_noise(unanimous):
    made = at({**CODEC, "floor": 0.1})
    found_D, _ = made.expand(np.full(LENGTH, unanimous), {}, LENGTH)
    np.testing.assert_allclose(sigmoid(GIVEN_D + found_D)[SCORES], 0.1 if unanimous < 0 else 0.9, atol=1e-6)


def test_chances_are_the_mode_of_the_beta_posterior_with_resets():
    """The paper's section 3.2: alpha and beta count draws from a prior on, and start afresh after ``memory`` rounds."""
    clients, prior, memory = 10, 1.5, 3  # the paper's lambda_0; here its weight is 2 (lambda_0 - 1) / clients rounds
    options = {**CODEC, "memory": memory, "prior": 2 * (prior - 1) / clients, "floor": 1e-6}
    draw, state = np.random.default_rng(5), build(options).start_state(LENGTH)
    for number in range(7):
        if number % memory == 0:
            alpha = beta = np.full(LENGTH, prior)
        present_D = draw.binomial(clients, 0.7, LENGTH)
        alpha, beta = alpha + present_D, beta + clients - present_D
        made = build(options).at(context(number))
        found_D, state = made.expand(present_D / clients - 0.5, state, LENGTH)
        mode_D = np.clip((alpha - 1) / (alpha + beta - 2), 1e-6, 1 - 1e-6)
        np.testing.assert_allclose(sigmoid(GIVEN_D + found_D)[SCORES], mode_D[SCORES], atol=1e-6)
        assert not state["sum"][~SCORES].any()


def test_the_bound_is_met_by_every_client_whatever_it_trained():
    """Half the root of the number of scores, no more and no less: noise for less would be too small."""
    made = only_scores(500)
    for vector in (np.zeros(500), np.full(500, 30.0), np.full(500, -1e4), np.linspace(-9, 9, 500)):
        norm = float(np.linalg.norm(linear(made, vector.astype(np.float32))))
        assert norm == pytest.approx(500**0.5 / 2, rel=1e-12) == made.l2_bound(0.0, 500)
    assert at(CODEC).l2_bound(1.0, LENGTH) <= build(CODEC).l2_bound(1.0, LENGTH)


def test_clients_that_train_from_elsewhere_are_an_error_not_a_guess():
    made = build(CODEC).at(RoundContext(run_seed=bytes(32), round_seed=bytes(32), shapes=((4,),), names=("a.scores",)))
    for call in (lambda: made.encode(np.zeros(4, dtype=np.float32), stream()), lambda: made.expand(np.zeros(4), {}, 4)):
        with pytest.raises(ConfigError, match="was not told"):
            call()


def test_a_layout_without_scores_is_quantised():
    """Such as the head's, in the phase that trains it alone."""
    made = at(CODEC, length=40)
    vector_D = np.linspace(-1, 1, 40, dtype=np.float32)
    np.testing.assert_allclose(linear(made, vector_D), vector_D, atol=4.0 / 127)
    assert np.array_equal(made.expand(vector_D.astype(np.float64), {}, 40)[0], vector_D)


def test_federated_masks_find_the_mask_that_made_the_data():
    """FedPM on a linear model: each client sees half of the inputs, and one bit a score is all that it sends."""
    draw = np.random.default_rng(9)
    signs, wanted = draw.choice([-1.0, 1.0], 60), draw.uniform(size=60) < 0.5
    scores = np.zeros(60)
    for number in range(40):
        made, messages = only_scores(60, scores.astype(np.float32), floor=0.05), []
        for client in range(10):
            x = draw.standard_normal((64, 60)) * (np.arange(60) % 2 == client % 2)
            own = scores.copy()
            for _ in range(5):
                mask = draw.uniform(size=60) < sigmoid(own)
                slope = sigmoid(own) * (1 - sigmoid(own))
                gradient = (x * ((x @ (signs * mask) - x @ (signs * wanted))[:, None])).mean(axis=0) * signs * slope
                own -= 4.0 * gradient
            messages.append(made.encode((own - scores).astype(np.float32), stream(number, client)))
        scores = scores + made.expand(made.linear_sum(total_of(made, messages, None)) / 10, {}, 60)[0]
    assert float(((scores > 0) == wanted).mean()) > 0.9
