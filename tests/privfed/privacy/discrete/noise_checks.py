"""Streams, probabilities and tests of fit that the tests of the discrete noise share."""

from __future__ import annotations

import mpmath
import numpy as np
from scipy import special, stats

from privfed.rng import PrivateStream

KEY = bytes(range(32))  # fixed, so that the statistical tests give one answer for ever
SIGNIFICANCE = 1e-6


def stream(*names):
    return PrivateStream(KEY, "discrete", *names)


class Scripted:
    """A stream of chosen bytes, to reach the rare paths; it knows when it was read to its end."""

    def __init__(self, *parts):
        self._bytes = b"".join(parts)

    def raw(self, count):
        assert count <= len(self._bytes)
        part, self._bytes = self._bytes[:count], self._bytes[count:]
        return np.frombuffer(part, dtype=np.uint8).copy()

    @property
    def left(self):
        return len(self._bytes)


def probabilities(name, deviation, values):
    """Return P(values) in double precision by formulas that share no code with the package.

    ``deviation`` is sigma, also where the law's standard deviation is a little less.
    """
    values = np.asarray(values)
    if name == "skellam":
        return special.ive(np.abs(values).astype(float), deviation**2)
    support = np.arange(-int(40 * deviation) - 20, int(40 * deviation) + 21)
    return np.exp(-(values**2) / (2 * deviation**2)) / np.exp(-(support**2) / (2 * deviation**2)).sum()


def precise_probabilities(name, deviation, values):
    """The same with 60 digits, as mpmath numbers."""
    with mpmath.workdps(60):
        v = mpmath.mpf(deviation) ** 2
        if name == "skellam":
            return [mpmath.exp(-v) * mpmath.besseli(abs(k), v) for k in values]
        total = mpmath.nsum(lambda k: mpmath.exp(-(k**2) / (2 * v)), [-mpmath.inf, mpmath.inf])
        return [mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * v)) / total for k in values]


def fit(draws, name, deviation, *, bins=200):
    """Return the p-value of a chi-square test of ``draws`` against the law of this deviation."""
    reach = int(np.abs(draws).max()) + 1
    values = np.arange(-reach, reach + 1)
    expected = probabilities(name, deviation, values) * draws.size
    observed = np.bincount(draws.astype(np.int64) + reach, minlength=values.size)
    edges = _bins(expected, max(20.0, draws.size / bins))
    expected, observed = np.add.reduceat(expected, edges), np.add.reduceat(observed, edges)
    expected = np.append(expected, max(draws.size - expected.sum(), 1e-9))  # what lies beyond the draws
    observed = np.append(observed, 0)
    if expected[-1] < 1:
        expected[-2] += expected[-1]
        expected, observed = expected[:-1], observed[:-1]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, len(expected) - 1))


def same_law(first, second, *, bins=100):
    """Return the p-value of a chi-square test that two sets of draws have one law."""
    reach = int(max(np.abs(first).max(), np.abs(second).max()))
    counts = [np.bincount(draws.astype(np.int64) + reach, minlength=2 * reach + 1) for draws in (first, second)]
    edges = _bins(counts[0] + counts[1], max(40.0, (first.size + second.size) / bins))
    table = np.array([np.add.reduceat(count, edges) for count in counts])
    return float(stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue)


def _bins(weights, least):
    """Return the first indices of runs that each weigh ``least`` or more (the last run may be joined to its
    neighbour)."""
    edges, weight = [0], 0.0
    for index, one in enumerate(weights):
        if weight >= least:
            edges.append(index)
            weight = 0.0
        weight += one
    if weight < least and len(edges) > 1:
        edges.pop()
    return edges


def log_probabilities(name, variance, values):
    """Return log P(values) in double precision, however far out, by code that shares nothing with the package's.

    For Skellam from the ratios I_(k+1) / I_k, which a continued fraction gives from the far end inwards.
    """
    values = np.abs(np.asarray(values))
    if name == "discrete_gaussian":
        support = np.arange(-int(40 * variance**0.5) - 20, int(40 * variance**0.5) + 21)
        return -(values**2) / (2 * variance) - np.log(np.exp(-(support**2) / (2 * variance)).sum())
    reach = int(values.max())
    ratio, logs = 0.0, np.zeros(reach + 1)
    for k in range(reach + 200 + int(20 * variance**0.5), 0, -1):
        ratio = 1 / (2 * k / variance + ratio)  # I_k / I_(k-1)
        if k <= reach:
            logs[k] = np.log(ratio)
    return (np.cumsum(logs) + np.log(special.ive(0, variance)))[values]


def divergence(log_p, log_q, order):
    """Return the Renyi divergence of ``order`` between two laws on the same points."""
    return float(special.logsumexp(order * log_p + (1 - order) * log_q)) / (order - 1)
