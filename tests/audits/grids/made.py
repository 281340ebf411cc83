"""A grid's folder with results of ideal attacks: what the page and the tables are tested on without training.

The cells are real configurations; each record is what a worker writes, with scores of an attack on a Gaussian mechanism
of the cell's epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import beta

from privfed_audits.bounds import epsilon_to_mu
from privfed_audits.grids.cells import Cell, cells
from privfed_audits.grids.grid import Grid, parse_grid
from privfed_audits.grids.results import Results, results
from privfed_audits.grids.store import Store, open_store

DELTA = 1e-5
CANARIES = 400
# what a tuning reaches without privacy, and how much of the ideal attack's strength is left on it
TUNINGS = {"LoRA": (0.70, 1.0), "FFA-LoRA": (0.68, 0.9), "BitFit": (0.63, 0.7), "head": (0.57, 0.4)}
BYTES = {"float32": 400_000, "8 bit": 100_000, "random <25 %>": 26_000}
GRID: dict[str, Any] = {
    "base": "tiny",
    "seeds": [1, 2, 3],
    "settings": ["privacy.reproducible_noise=true"],
    "tuning": {
        "LoRA": ["tuning.name=lora"],
        "FFA-LoRA": ["tuning.name=ffa_lora"],
        "BitFit": ["tuning.name=select", 'tuning.select=["*.bias"]'],
        "head": ["tuning.name=head", "head_warm_start.name=none"],
    },
    "codec": {
        "float32": ["compression.name=identity"],
        "8 bit": ["compression.name=stochastic_quantizer"],
        "random <25 %>": ["compression.name=random_k", "compression.density=0.25"],
    },
    "privacy": {
        "none": ["privacy.unit=none", "privacy.target_epsilon=unset"],
        "epsilon 8": ["privacy.target_epsilon=8.0"],
        "epsilon 2": ["privacy.target_epsilon=2.0"],
    },
}


def grid(**changes: Any) -> Grid:
    """Return the grid, with changes."""
    return parse_grid({**GRID, **changes}, where="made")


def write(folder: Path, made: Grid, *, waiting: int = 0, failed: int = 0) -> Store:
    """Write a grid's folder in which the last cells are still waiting and the first have failed."""
    store = open_store(folder, made, resume=False)
    for number, cell in enumerate(cells(made)[: len(cells(made)) - waiting]):
        reason = "RoundError: too few clients <survived>"
        store.keep(cell.key, {"state": "failed", "reason": reason} if number < failed else record(cell))
    return store


def read(store: Store, made: Grid) -> Results:
    """Return the results of a folder."""
    return results(made, cells(made), store.read())


def record(cell: Cell, *, views: tuple[str, ...] = ("aggregate", "release")) -> dict[str, Any]:
    """Return what a worker would write of a cell."""
    rng = np.random.default_rng([cell.seed, *cell.key.encode()])
    top, strength = TUNINGS[cell.tuning]
    epsilon = {"none": None, "epsilon 8": 8.0, "epsilon 2": 2.0}[cell.privacy]
    cost = {"none": 0.0, "epsilon 8": 0.05, "epsilon 2": 0.14}[cell.privacy]
    mu = strength * (3.0 if epsilon is None else epsilon_to_mu(epsilon, DELTA))
    promise = {"epsilon": epsilon, "delta": DELTA, "unit": "example"}
    nothing = {"epsilon": None, "delta": None, "unit": None, "why": "no noise was added"}
    sent = BYTES[cell.codec] * (0.1 if cell.tuning == "head" else 1.0)
    return {
        "state": "done",
        "utility": {"accuracy": float(top - cost + rng.normal(0, 0.006)), "n_test": 2000.0},
        "promises": {v: nothing if epsilon is None or v == "individual" else promise for v in ("individual", *views)},
        "simulated": epsilon is not None,
        "noise_multiplier": None if epsilon is None else 8.0 / epsilon,
        "bytes_round": sent / 10,
        "bytes_run": float(sent),
        "trained": 1000,
        "cpu_seconds": float(rng.uniform(5, 9)),
        "wall_seconds": float(rng.uniform(5, 9)),
        "audit": audit({view: mu * (1.0 if view == "aggregate" else 0.6) for view in views}, epsilon, rng),
    }


def audit(mus: Mapping[str, float], epsilon: float | None, rng: np.random.Generator) -> dict[str, Any]:
    """Return what an audit would write whose attacks see Gaussians ``mu`` apart."""
    example = {
        "truth": "the cat <b>sat</b> on the mat",
        "found": "the cat sat the mat",
        "prior": "a dog",
        "score": 0.83,
    }
    gallery = {"attack": "span", "token_recall": 0.4, "prior_token_recall": 0.1, "rouge_l": 0.5, "examples": [example]}
    return {
        "schema": 1,
        "contradicted": False,
        "views": {view: _view(mu, epsilon, rng) for view, mu in mus.items()},
        "reconstruction": {"aggregate": gallery} if epsilon is None else {},
    }


def _view(mu: float, epsilon: float | None, rng: np.random.Generator) -> dict[str, Any]:
    from privfed_audits.bounds import mu_to_epsilon

    inside, outside = np.sort(rng.normal(mu, 1, CANARIES // 2)), np.sort(rng.normal(0, 1, CANARIES // 2))
    fpr = np.arange(0, CANARIES // 2 + 1) / (CANARIES // 2)
    hits = np.array([(inside >= t).sum() for t in [np.inf, *outside[::-1]]])
    n = CANARIES // 2
    low, high = beta.ppf(0.025, hits, n - hits + 1), beta.ppf(0.975, hits + 1, n - hits)
    thin = slice(None, None, 5)
    allowed = None if epsilon is None else ndtr(ndtri(fpr[thin]) + epsilon_to_mu(epsilon, DELTA)).tolist()
    found = max(0.0, mu_to_epsilon(max(mu - 0.6 + rng.normal(0, 0.1), 0.0), DELTA))
    return {
        "attack": "gradient",
        "bound": "gdp",
        "empirical_epsilon": found,
        "interval": [found, mu_to_epsilon(mu + 0.6, DELTA)],
        "ceiling": None if epsilon is None else mu_to_epsilon(epsilon_to_mu(epsilon, DELTA) - 0.4, DELTA),
        "accounted_epsilon": epsilon,
        "delta": DELTA,
        "unit": "example",
        "canaries": CANARIES,
        "auc": float(ndtr(mu / np.sqrt(2)) + rng.normal(0, 0.01)),
        "tpr_at_fpr": {"fpr": 0.01, "tpr": float(ndtr(mu + ndtri(0.01))), "low": 0.01, "high": 0.9},
        "roc": {
            "fpr": fpr[thin].tolist(),
            "tpr": (hits / n)[thin].tolist(),
            "low": np.nan_to_num(low)[thin].tolist(),
            "high": np.nan_to_num(high, nan=1.0)[thin].tolist(),
            "allowed": allowed,
        },
        "assumptions": ["The canaries do not interact."],
    }
