from __future__ import annotations

from typing import Any

import pytest

from privfed.errors import ConfigError
from privfed.secagg import ClientSession, default_threshold


@pytest.mark.parametrize(
    "changes",
    [
        {"clients": ()},
        {"clients": ("a",), "threshold": 1},
        {"clients": ["a", "b", "c"]},
        {"clients": ("b", "a", "c")},
        {"clients": ("a", "a", "c")},
        {"clients": ("", "b", "c")},
        {"clients": ("a", "b", "c" * 129)},
        {"clients": ("a", "b", "\ud800")},
        {"clients": ("a", "b", 3)},
        {"threshold": 1},
        {"threshold": 4},
        {"threshold": 2.0},
        {"clients": ("a", "b", "c", "d"), "threshold": 2},
        {"length": -1},
        {"length": 2**31},
        {"length": True},
        {"ring_bits": 24},
        {"round_id": b""},
        {"round_id": "text"},
        {"round_id": bytes(65)},
        {"config_digest": b""},
    ],
)
def test_parameters_that_cannot_hold_are_refused(make_params: Any, changes: dict[str, Any]) -> None:
    make_params()
    with pytest.raises(ConfigError):
        make_params(**changes)


@pytest.mark.parametrize(("n", "threshold"), [(2, 2), (3, 2), (4, 3), (6, 4), (9, 6), (10, 7), (20, 14), (300, 200)])
def test_default_threshold_is_two_thirds(make_params: Any, n: int, threshold: int) -> None:
    assert default_threshold(n) == threshold


def test_default_threshold_is_always_valid(make_params: Any) -> None:
    for n in range(2, 60):
        ids = tuple(sorted(map(str, range(n))))
        for fraction in (0.01, 0.5, 0.51, 2 / 3, 0.9, 1.0):
            make_params(clients=ids, threshold=default_threshold(n, fraction))


def test_default_threshold_refuses_nonsense() -> None:
    for n, fraction in [(1, 0.5), (0, 0.5), (3, 0.0), (3, 1.1), (3, float("nan"))]:
        with pytest.raises(ConfigError):
            default_threshold(n, fraction)


def test_a_client_outside_the_cohort_is_refused(make_params: Any) -> None:
    with pytest.raises(ConfigError, match="'z'"):
        ClientSession(make_params(), "z")
