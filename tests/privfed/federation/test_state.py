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
