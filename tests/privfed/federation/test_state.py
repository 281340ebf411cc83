"""The server's step, against torch's optimisers on the same sequence of averages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from privfed.federation.state import ServerState, server_step
from privfed.schedule import ServerConfig

SIZE, STEPS = 37, 12


def _updates() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.standard_normal(SIZE) * 10.0 ** rng.integers(-4, 1) for _ in range(STEPS)]


def _start() -> np.ndarray:
    return np.random.default_rng(6).standard_normal(SIZE).astype(np.float32)


def _ours(config: ServerConfig) -> list[np.ndarray]:
    state = ServerState(phase="train", round=0, params_D=_start(), taken={"a": 2})
    found = []
    for number, update in enumerate(_updates(), start=1):
        state = server_step(state, update, config)
        assert state.round == number
        assert state.params_D.dtype == np.float32
        assert state.taken == {"a": 2}
        found.append(state.params_D)
    return found


def _torchs(make: type[torch.optim.Optimizer], **options: object) -> list[np.ndarray]:
    parameter = torch.nn.Parameter(torch.from_numpy(_start()))
    optimizer = make([parameter], **options)
    found = []
    for update in _updates():
        parameter.grad = torch.from_numpy(-update).float()  # an average update is a negative gradient
        optimizer.step()
        found.append(parameter.detach().numpy().copy())
    return found


@pytest.mark.parametrize(
    ("config", "make", "options"),
    [
        (ServerConfig(), torch.optim.SGD, {"lr": 1.0}),
        (ServerConfig(learning_rate=0.3, momentum=0.8), torch.optim.SGD, {"lr": 0.3, "momentum": 0.8}),
        (
            ServerConfig(optimizer="adam", learning_rate=0.02, beta1=0.9, beta2=0.99, epsilon=1e-6),
            torch.optim.Adam,
            {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6},
        ),
        (
            ServerConfig(optimizer="adam", learning_rate=0.1, beta1=0.0, beta2=0.5, epsilon=1e-3),
            torch.optim.Adam,
            {"lr": 0.1, "betas": (0.0, 0.5), "eps": 1e-3},
        ),
    ],
)
def test_steps_equal_torchs(
    config: ServerConfig, make: type[torch.optim.Optimizer], options: dict[str, object]
) -> None:
    for found, wanted in zip(_ours(config), _torchs(make, **options), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


def test_a_step_leaves_the_state_it_came_from() -> None:
    state = ServerState(phase="train", round=0, params_D=_start())
    after = server_step(state, _updates()[0], ServerConfig(optimizer="adam"))
    kept = {name: value.copy() for name, value in after.optimizer.items()}
    server_step(after, _updates()[1], ServerConfig(optimizer="adam"))
    np.testing.assert_array_equal(state.params_D, _start())
    for name, value in after.optimizer.items():
        np.testing.assert_array_equal(value, kept[name])


def test_its_repr_shows_no_values() -> None:
    state = server_step(
        ServerState(phase="train", round=0, params_D=_start()), _updates()[0], ServerConfig(optimizer="adam")
    )
    assert "array" not in repr(state)


# Reddi et al. 2021, Algorithm 2, by hand: start 1, updates 1/2, -1/4, 1/16; beta1 1/2, beta2 3/4, tau 1/10, rate 1/5.
# m is 1/4, 0, 1/32. v starts at tau^2 = 0.01; squares of the updates: 0.25, 0.0625, 0.00390625.
BY_HAND = {
    # v: 0.26, 0.3225, 0.32640625
    "fedadagrad": (1 + 0.05 / (0.5099019514 + 0.1), 0.00625 / (0.5713197437 + 0.1)),
    # v: 0.0075 + 0.0625 = 0.07, 0.0525 + 0.015625 = 0.068125, 0.05109375 + 0.0009765625 = 0.0520703125
    "fedadam": (1 + 0.05 / (0.2645751311 + 0.1), 0.00625 / (0.2281892032 + 0.1)),
    # v: 0.01 + 0.0625 = 0.0725, 0.0725 - 0.015625 = 0.056875, 0.056875 - 0.0009765625 = 0.0558984375
    "fedyogi": (1 + 0.05 / (0.2692582404 + 0.1), 0.00625 / (0.2364284194 + 0.1)),
}


@pytest.mark.parametrize("name", list(BY_HAND))
def test_adaptive_steps_equal_those_done_by_hand(name: str) -> None:
    config = ServerConfig.model_validate(
        {"optimizer": name, "learning_rate": 0.2, "beta1": 0.5, "beta2": 0.75, "tau": 0.1}
    )
    state = ServerState(phase="train", round=0, params_D=np.ones(3, dtype=np.float32))
    found = []
    for update in (0.5, -0.25, 0.0625):
        state = server_step(state, np.full(3, update), config)
        found.append(float(state.params_D[1]))
    first, last = BY_HAND[name]  # the second update only undoes the first one's momentum
    assert found == pytest.approx([first, first, first + last], rel=1e-6)


def test_fedavgm_is_the_moving_sum() -> None:
    config = ServerConfig(optimizer="fedavgm", momentum=0.5, learning_rate=2.0)
    state = ServerState(phase="train", round=0, params_D=np.zeros(1, dtype=np.float32))
    for update, wanted in ((1.0, 2.0), (0.0, 3.0), (-1.0, 1.5)):  # velocities 1, 0.5, -0.75
        state = server_step(state, np.full(1, update), config)
        assert state.params_D[0] == wanted
    sgd = ServerConfig(momentum=0.8, learning_rate=0.3)
    named = ServerConfig(optimizer="fedavgm", momentum=0.8, learning_rate=0.3)
    for ours, wanted_D in zip(_ours(named), _ours(sgd), strict=True):
        np.testing.assert_array_equal(ours, wanted_D)


@pytest.mark.parametrize("name", ["sgd", "adam", "fedadagrad", "fedadam", "fedyogi"])
def test_a_step_with_a_part_is_that_of_the_part_alone(name: str) -> None:
    """Values that a round does not send keep their parameters and their optimiser's vectors."""
    from privfed.federation.sharing import Selection
    from privfed.types import ParamLayout

    layout = ParamLayout(names=("a", "b", "c"), shapes=((10,), (20,), (7,)), digest="")
    first, second = Selection(layout, {"a", "c"}), Selection(layout, {"b"})
    config = ServerConfig.model_validate({"optimizer": name, "learning_rate": 0.1, "momentum": 0.5})
    whole = ServerState(phase="train", round=0, params_D=_start())
    alone = {part: ServerState(phase="train", round=0, params_D=part.take(_start())) for part in (first, second)}
    for number, update in enumerate(_updates()):
        part = (first, second)[number % 2]
        turns = number // 2 + 1
        before = whole
        whole = server_step(whole, part.take(update), config, sent=part, turns=turns)
        alone[part] = server_step(alone[part], part.take(update), config, turns=turns)
        other = (second, first)[number % 2]
        np.testing.assert_array_equal(other.take(whole.params_D), other.take(before.params_D))
        for each, state in alone.items():
            np.testing.assert_array_equal(each.take(whole.params_D), state.params_D)
