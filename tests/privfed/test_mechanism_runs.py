"""Whole client-level runs with every mechanism: what the receipt says can be computed again from its events."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant

from privfed.privacy.ledger import Ledger
from privfed.privacy.mechanisms import MECHANISMS
from privfed.run import train

DELTA = 1e-4
CASES = [{"name": name} for name in MECHANISMS.names()] + [
    {"name": "banded", "bands": 3, "sampling": "min_separation", "coefficients": "square_root"}
]


def _config(tiny_config: Callable[..., Any], mechanism: dict[str, Any], tmp_path: Path) -> Any:
    return tiny_config(
        reproducible_noise=False,
        partition={"name": "iid", "clients": 12},
        privacy={"unit": "client", "target_epsilon": None, "noise_multiplier": 1.5, "mechanism": mechanism},
        secagg={"name": "none"},
        server={"rounds": 5, "cohort_size": 4, "evaluate_every": 5},
        ledger={"path": str(tmp_path / "holder.sqlite")},
    )


def _noise_multiplier(event: dict[str, Any]) -> float:
    """Return an event's noise multiplier from its parameters alone, as somebody without privfed would."""
    told = event["parameters"]
    if event["mechanism"] == "adaptive_clipping":
        return float((told["update_noise_multiplier"] ** -2 + (2 * told["count_noise"]) ** -2) ** -0.5)
    if event["mechanism"] == "banded":
        c = np.array(told["coefficients"])
        if "groups" in told:
            assert len(c) <= told["groups"]
            return float(told["deviation"] / np.linalg.norm(c))
        rounds, most, apart = (int(told[name]) for name in ("rounds", "participations", "separation"))
        C = np.array([[c[t - s] if 0 <= t - s < len(c) else 0.0 for s in range(rounds)] for t in range(rounds)])
        return float(told["deviation"] / np.linalg.norm(C[:, :: int(apart)][:, :most].sum(axis=1)))
    return float(event["noise_multiplier"])


@pytest.mark.parametrize("mechanism", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_receipt_can_be_computed_again(
    mechanism: dict[str, Any], tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    config = _config(tiny_config, mechanism, tmp_path)
    receipt = train(config, out=tmp_path / "run").receipt
    assert receipt["private"]
    view = receipt["views"]["release"]
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)
    for event in receipt["events"]:
        noise = _noise_multiplier(event)
        assert event["noise_multiplier"] <= noise * (1 + 1e-9)
        gaussian = dp_event.GaussianDpEvent(noise)
        q = event["sampling_probability"]
        accountant.compose(dp_event.PoissonSampledDpEvent(q, gaussian) if q < 1 else gaussian, event["steps"])
    assert view["epsilon"] == pytest.approx(accountant.get_epsilon(DELTA), rel=5e-3)
    assert receipt["views"]["aggregate"]["epsilon"] is None
    said = " ".join(view["assumptions"])
    words = {"gaussian": "expected cohort", "adaptive_clipping": "updates and counts together", "banded": "enforces it"}
    assert words[mechanism["name"]] in said
    statuses = {each["name"]: each for each in receipt["accountant"]["assumptions"]}
    assert statuses["sampling"]["status"] == "met"
    assert ("schedule" in statuses["sampling"]["sentence"]) is (mechanism.get("sampling") == "min_separation")
    with Ledger.open(tmp_path / "holder.sqlite", create=False) as ledger:
        assert ledger.verify() == []
        assert len(ledger.entries()) == 5
        assert ledger.spent(data_digest=receipt["data"]["digest"], unit="client", delta=DELTA) == pytest.approx(
            view["epsilon"], rel=5e-3
        )


def test_the_metrics_tell_the_course_of_the_clip(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    train(_config(tiny_config, {"name": "adaptive_clipping"}, tmp_path), out=tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    clips = [record["terms"][0] for record in records if record["kind"] == "round"]
    assert clips[0] == 0.5
    assert len(set(clips)) == 5 and all(0 < clip < math.inf for clip in clips)
