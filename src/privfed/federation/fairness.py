"""How evenly a run serves its clients: each one's accuracy or perplexity, their mean, and that of the worst tenth.

Where the test rows have natural clients, a client is scored on its own test rows. Where they have none, the accuracy of
each class on all test rows is weighted by how often the client's *training* rows have that class: what the client
would see if its future looked like its past. Both are simulation figures: the labels are the clients' own and nothing
noises these numbers; ``basis`` says which it is, and that they are no part of the release. A language model is scored
by perplexity over the learned tokens of a client's own test rows; where those have no natural clients nothing is said.

Where nothing is personal one evaluation serves all clients. Personal parts need a pass for each client; at most
``server.evaluate_clients`` of them, chosen once by the run's seed, are scored.

Shape suffixes: N test rows, C clients, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privfed.rng import experiment_rng
from privfed.types import Shard

Rows = NDArray[np.int64]
ByRow = NDArray[np.float64]

OWN_ROWS = "test rows of each client"
OWN_LABELS = "all test rows, weighted by class as each client's training rows"
NOTE = "simulation only, not part of the release"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientScores:
    """Accuracies or perplexities over clients.

    Attributes:
        metric: ``accuracy``, or ``perplexity`` (lower is better).
        mean: Of all clients scored, each counting the same.
        worst_tenth: Mean over the tenth (rounded up) of the clients that are served worst.
        scored: How many clients were scored.
        basis: What they were scored on.
    """

    metric: str
    mean: float
    worst_tenth: float
    scored: int
    basis: str

    def record(self) -> dict[str, float | int | str | None]:
        """Return what an ``eval`` line of metrics.jsonl says; what is not finite is None."""
        return {
            "clients_metric": self.metric,
            "clients_mean": self.mean if math.isfinite(self.mean) else None,
            "clients_worst_tenth": self.worst_tenth if math.isfinite(self.worst_tenth) else None,
            "clients_scored": self.scored,
            "clients_basis": f"{self.basis}; {NOTE}",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fairness:
    """What each client is scored on: its own test rows, or weights over classes.

    Attributes:
        rows: Test rows by client, where the test split has clients.
        labels_N: Classes of the test rows; empty for a language model.
        shares: Share of each class in a client's training rows, [K] by client, where ``rows`` is empty.
        most: At most so many clients are scored where each needs a pass.
        seed: The run's seed, which chooses them.
        metric: ``accuracy`` or ``perplexity``.
    """

    rows: Mapping[str, Rows] = field(repr=False)
    labels_N: NDArray[np.int64] = field(repr=False)
    shares: Mapping[str, NDArray[np.float64]] = field(repr=False)
    most: int
    seed: int
    metric: str = "accuracy"

    @property
    def basis(self) -> str:
        """What clients are scored on."""
        return OWN_ROWS if self.rows else OWN_LABELS

    def shared(self, by_row_N: ByRow) -> ClientScores | None:
        """Return the scores of one model that all clients have, from what it does on each test row.

        Args:
            by_row_N: As ``privfed.federation.evaluate.Score`` has it.
        """
        clients = self.rows or self.shares
        return self._summary([self._score(client, by_row_N) for client in clients])

    def personal(self, by_row_N: ByRow, own: Callable[[str, Rows], ByRow | None]) -> ClientScores | None:
        """Return the scores of models of their own.

        Args:
            by_row_N: What the server's model does on each test row: for clients that have none of their own yet.
            own: Maps a client and test rows to what its own model does on them; None if it has none.
        """
        scores = []
        for client in self.chosen():
            rows = self._needed(client)
            found = own(client, rows)
            if found is not None:
                whole_N = by_row_N.copy()
                whole_N[rows] = found
            scores.append(self._score(client, by_row_N if found is None else whole_N))
        return self._summary(scores)

    def chosen(self) -> list[str]:
        """Return the clients that are scored where each needs a pass: the same ones in every evaluation."""
        clients = sorted(self.rows or self.shares)
        if len(clients) <= self.most:
            return clients
        picked = experiment_rng(self.seed, "evaluate_clients").permutation(len(clients))[: self.most]
        return [clients[int(i)] for i in sorted(picked)]

    def _needed(self, client: str) -> Rows:
        if self.rows:
            return self.rows[client]
        return np.flatnonzero(self.shares[client][self.labels_N] > 0)

    def _score(self, client: str, by_row_N: ByRow) -> float | None:
        """Return a client's score; None where no test row says anything about it."""
        if self.metric == "perplexity":
            loss, tokens = by_row_N[self.rows[client]].sum(axis=0)
            return (math.exp(loss / tokens) if loss / tokens < 700 else math.inf) if tokens else None
        if self.rows:
            return float(by_row_N[self.rows[client]].mean())
        shares_K = self.shares[client]
        counts_K = np.bincount(self.labels_N, minlength=len(shares_K))
        seen_K = (counts_K > 0) & (shares_K > 0)
        if not seen_K.any():
            return None
        hits_K = np.bincount(self.labels_N, weights=by_row_N, minlength=len(shares_K))
        weights_K = shares_K[seen_K] / shares_K[seen_K].sum()
        return float(weights_K @ (hits_K[seen_K] / counts_K[seen_K]))

    def _summary(self, scores: Sequence[float | None]) -> ClientScores | None:
        known = sorted((score for score in scores if score is not None), reverse=self.metric == "perplexity")
        if not known:
            return None
        worst = known[: math.ceil(len(known) / 10)]
        return ClientScores(
            metric=self.metric,
            mean=float(np.mean(known)),
            worst_tenth=float(np.mean(worst)),
            scored=len(known),
            basis=self.basis,
        )


def make_fairness(
    shards: Sequence[Shard],
    *,
    train_labels: NDArray[np.int64] | None,
    test_labels: NDArray[np.int64] | None,
    test_clients: Sequence[str] | None,
    classes: int,
    most: int,
    seed: int,
) -> Fairness | None:
    """Return what to score clients on; None where rows have neither classes nor clients that train.

    Args:
        shards: The clients' training rows.
        train_labels: Classes of all training rows; None for a language model.
        test_labels: Classes of the test rows; None likewise.
        test_clients: Natural clients of the test rows.
        classes: K.
        most: ``server.evaluate_clients``.
        seed: The run's seed.
    """
    known = {shard.client_id for shard in shards}
    rows: dict[str, list[int]] = {}
    for row, client in enumerate(test_clients or ()):
        if client in known:
            rows.setdefault(client, []).append(row)
    own = {client: np.asarray(found, dtype=np.int64) for client, found in rows.items()}
    if train_labels is None or test_labels is None:
        none = np.zeros(0, dtype=np.int64)
        return Fairness(rows=own, labels_N=none, shares={}, most=most, seed=seed, metric="perplexity") if own else None
    shares = {}
    if not own:
        for shard in shards:
            counts_K = np.bincount(train_labels[shard.indices], minlength=classes).astype(np.float64)
            shares[shard.client_id] = counts_K / counts_K.sum()
    return Fairness(rows=own, labels_N=test_labels, shares=shares, most=most, seed=seed)
