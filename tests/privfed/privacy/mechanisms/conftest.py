"""A keeper with a real ledger and a fixed key, for driving a mechanism without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.federation.client import Holder
from privfed.privacy.ledger import Ledger
from privfed.privacy.mechanisms import Moment, Site
from privfed.privacy.plan import PhasePlan

KEY = bytes(range(32))  # fixed, so that the statistical tests give one answer for ever


def plan(**changes: Any) -> PhasePlan:
    """Return a phase of 100 clients in cohorts of 20."""
    values = {"name": "train", "rounds": 10, "cohort_size": 20, "clients": 100, "local_steps": 1, "probabilities": {}}
    return PhasePlan(**{**values, **changes})


def site(**changes: Any) -> Site:
    """Return a place of 10 values and clip 1, with a codec that changes nothing."""
    values = {
        "plan": plan(**changes.pop("plan", {})),
        "noise_multiplier": 1.0,
        "relation": "add_or_remove_one",
        "l2_clip_norm": 1.0,
        "largest_clip": None,
        "size": 10,
        "bound": lambda clip, length: clip,
        "seed": 0,
    }
    return Site(**{**values, **changes})


class Drive:
    """Runs a mechanism round by round on given sums."""

    def __init__(self, at_work: Any, keeper: Holder) -> None:
        self.at_work, self.keeper = at_work, keeper
        self.memory: Any = {}
        self.number = 0

    def release(self, sum_M: Any, *, lost: str | None = None, broadcast: bytes = b"") -> Any:
        """Release the next round and keep its memory."""
        self.number += 1
        moment = Moment(phase="train", round=self.number, broadcast=broadcast, lost=lost)
        found = self.at_work.release(sum_M, moment, self.keeper, self.memory)
        self.memory = found.memory
        return found

    def zeros(self, size: int) -> Any:
        """Release a round of nothing but noise."""
        return self.release(np.zeros(size + self.at_work.extra)).mean_D


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    """Return ``keeper(run="run")``: a data holder; each has a ledger of its own unless ``path`` is given."""
    with ExitStack() as stack:
        made = 0

        def build(run: str = "run", path: Path | None = None, key: bytes = KEY) -> Holder:
            nonlocal made
            made += 1
            ledger = stack.enter_context(Ledger.open(path or tmp_path / f"ledger-{made}.sqlite"))
            return Holder(
                ledger=ledger,
                key=key,
                run_id=run,
                ledger_run_id=run,
                data_digest="d",
                partition_digest="p",
                project="default",
            )

        yield build


@pytest.fixture(scope="session")
def make() -> Any:
    """Return ``site`` and ``plan`` and ``Drive`` as attributes."""
    from types import SimpleNamespace

    return SimpleNamespace(site=site, plan=plan, Drive=Drive)
