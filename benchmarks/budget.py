"""``privfed budget`` against dp-accounting called directly, for five settings, with the command's wall time.

python benchmarks/budget.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

# (sampling probability, noise multiplier, steps)
SETTINGS = [(0.01, 1.0, 1000), (0.01, 0.8, 10_000), (0.05, 1.0, 1000), (0.1, 2.0, 10_000), (1.0, 20.0, 100)]
DELTA = 1e-5


def direct(q: float, sigma: float, steps: int, interval: float) -> float:
    """Return dp-accounting's own epsilon."""
    import dp_accounting as dpa
    from dp_accounting.pld import PLDAccountant

    event: dpa.DpEvent = dpa.GaussianDpEvent(sigma)
    if q < 1:
        event = dpa.PoissonSampledDpEvent(q, event)
    accountant = PLDAccountant(value_discretization_interval=interval)
    accountant.compose(dpa.SelfComposedDpEvent(event, steps))
    return float(accountant.get_epsilon(DELTA))


def asked(q: float, sigma: float, steps: int) -> tuple[float, float]:
    """Return the command's epsilon and its wall time."""
    settings = [
        f"client.sampling_probability={q}",
        "client.local_steps=10",
        f"server.rounds={steps // 10}",
        f"privacy.noise_multiplier={sigma}",
        "privacy.target_epsilon=unset",
        f"privacy.target_delta={DELTA}",
        "head_warm_start.name=none",
    ]
    command = [sys.executable, "-m", "privfed.cli", "budget", "demo", "--clients", "5", "--json"]
    for setting in settings:
        command += ["-s", setting]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["epsilon"], time.perf_counter() - started


def main() -> None:
    from privfed.privacy.accountant import interval
    from privfed.types import PrivacyEvent

    print(f"{'q':>6} {'sigma':>6} {'steps':>6} {'privfed':>10} {'dp-accounting':>14} {'ratio':>10} {'seconds':>8}")
    for q, sigma, steps in SETTINGS:
        event = PrivacyEvent(unit="example", noise_multiplier=sigma, sampling_probability=q, steps=steps)
        found, seconds = asked(q, sigma, steps)
        reference = direct(q, sigma, steps, interval([event]))
        print(f"{q:6} {sigma:6} {steps:6} {found:10.6f} {reference:14.6f} {found / reference:10.6f} {seconds:8.2f}")


if __name__ == "__main__":
    main()
