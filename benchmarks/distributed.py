"""Where the noise is added, at one epsilon per example: on each client, in shares of one sum, or by a trusted server.

    python benchmarks/distributed.py demo
    python benchmarks/distributed.py banking77 --data DIR    # DIR holds the data set's two files
    python benchmarks/distributed.py                         # print the table of everything run so far

Ways to train the same model on the same clients, by the same federation code:

- ``local``: each client adds the noise of its own batch (DP-SGD), so the average has sqrt(clients) times the noise that
  one server would add.
- ``distributed``: each client sends one sum of clipped gradients a round with its share of the noise, in integers of
  24 bits under secure aggregation. Shares are large enough if 30 % of the clients drop and 10 % are corrupt.
- ``distributed, all trusted``: as before, and all clients are counted on: what integers by themselves cost.
- ``central``: what a trusted server would get: the same sums without the clients' noise, to which the server adds
  Gaussian noise. privfed has no such placement; it is made here, of a distributed run, for comparison only.

The last three share every other setting; ``local`` may have another learning rate, for other values suit other noise:
see ``TUNED``. The noise of all is solved by the same accountant (Renyi) for the same epsilon and delta, and clients
weigh by their examples in all. ``--no-masks`` leaves out the protocol, not the ring. Finished cells are kept in
benchmarks/distributed.jsonl and not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from results import FILES, share_frozen_work
from shared_work import frozen_work

from privfed.config import RunConfig, load_config
from privfed.errors import ThresholdError
from privfed.federation import round as rounds
from privfed.federation import setup
from privfed.federation.collect import Collected
from privfed.federation.distributed import Shares, make_shares
from privfed.federation.phases import phase_plans
from privfed.privacy.mechanisms import Keeper
from privfed.privacy.noise import gaussian_noise
from privfed.privacy.plan import PhasePlan, Plan, make_plan
from privfed.rng import PrivateStream, secret_key
from privfed.run import train
from privfed.secagg import Identity, Requirements
from privfed.types import Encoded, EncodedSum, Shard

STORE = Path(__file__).with_name("distributed.jsonl")
COMMON = ["privacy.accountant=rdp"]
LOCAL = ["privacy.placement=local", "server.weighting=examples"]
SUMMED = ["privacy.placement=distributed", "server.weighting=uniform", "secagg.ring_bits=24"]
TRUSTED = [*SUMMED, "secagg.dropped=0.0", "secagg.corrupt=0.0"]
VARIANTS = {"local": LOCAL, "distributed": SUMMED, "distributed, all trusted": TRUSTED, "central": TRUSTED}
PRESETS = {"demo": "demo", "banking77": "banking77"}
# 50 clients, and the head alone on the frozen model, all of the budget for it: 50 clients cost a second of cryptography
# a round, and rounds of the head nothing else
HEAD = [
    "partition.clients=50",
    "tuning.name=head",
    "head_warm_start.name=none",
    "model.cache_frozen_gib=0.0",
    "client.sampling_probability=1.0",
    "client.physical_batch_size=1024",
    "server.optimizer=adam",
    "server.momentum=0.0",
    "server.rounds=20",
    "server.evaluate_every=20",
]
# by data set, what was tuned for the noise of single clients and for that of the sum; the demo runs as it is shipped,
# with values that were tuned for the noise of single clients
TUNED: dict[str, dict[str, list[str]]] = {
    "demo": {"local": [], "summed": []},
    "banking77": {
        "local": [*HEAD, "server.learning_rate=0.3"],
        "summed": [*HEAD, "server.learning_rate=0.2", "privacy.distributed.rotate=true"],
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedServer(Shares):
    """Sums without the clients' noise, to which the server adds its own.

    Attributes:
        noised: The run's own, whose charges and records stay as they are.
        deviation: Standard deviation of the noise of each value of a sum of clipped gradients.
        key: Where the noise comes from.
    """

    noised: Shares
    deviation: float
    key: bytes = field(repr=False)

    def refusal(self, survivors: Sequence[str], broadcast: bytes, round_number: int, keeper: Keeper) -> str | None:
        """Return what the run itself says."""
        return self.noised.refusal(survivors, broadcast, round_number, keeper)

    def update(
        self, total: EncodedSum, survivors: Sequence[str], run_id: str, round_number: int
    ) -> NDArray[np.float64]:
        """Return the averaged update [D] with the server's noise in it."""
        clean_D = Shares.update(self, total, survivors, run_id, round_number)
        stream = PrivateStream(self.key, "trusted server", self.phase, round_number)
        noise_D = gaussian_noise(stream, clean_D.size, self.deviation)
        noised_D: NDArray[np.float64] = clean_D - self.rates_D * noise_D / sum(self.batches[c] for c in survivors)
        return noised_D


def gaussian_multiplier(config: RunConfig, sizes: dict[str, int]) -> float:
    """Return the noise multiplier of DP-SGD for the run's epsilon, which is the trusted server's as well."""
    tables = config.to_dict()
    tables["privacy"] = {**tables["privacy"], "placement": "local"}
    tables["privacy"].pop("distributed", None)
    tables["server"] = {**tables["server"], "weighting": "examples"}
    local = RunConfig.model_validate(tables)
    return make_plan(local.privacy, phase_plans(local, sizes), masked=True).noise_multiplier


class Placement:
    """Stands in for ``make_shares``: notes how much noise each phase has, and lets a trusted server add it instead.

    Attributes:
        noise: By phase, the standard deviation of the noise of a sum of clipped gradients over the one that a trusted
            server would add.
    """

    def __init__(self, *, central: bool) -> None:
        self.central = central
        self.noise: dict[str, float] = {}

    def __call__(
        self, config: RunConfig, shards: Sequence[Shard], phase: PhasePlan, plan: Plan | None, *others: Any
    ) -> Shares | None:
        """Return what ``make_shares`` does, or with a trusted server instead of the clients' noise."""
        made = make_shares(config, shards, phase, plan, *others)
        if made is None:  # each client has the noise that the server would have, on its own
            self.noise[phase.name] = math.sqrt(len(shards))
            return None
        multiplier = gaussian_multiplier(config, {shard.client_id: len(shard) for shard in shards})
        deviation = multiplier * phase.noise_scale * config.privacy.l2_clip_norm
        params = made.params
        self.noise[phase.name] = math.sqrt(params.n * params.local_variance) / params.scale / deviation
        if not self.central:
            return made
        self.noise[phase.name] = 1.0
        given = {each.name: getattr(made, each.name) for each in fields(Shares)}
        given["params"] = replace(params, local_variance=0.0)
        return TrustedServer(**given, noised=made, deviation=deviation, key=secret_key())


class SumWithoutMasks:
    """Stands in for ``MaskedLink``: adds the same residues in the same ring, without the protocol around them.

    Masks cancel exactly, so the sum is the same to the bit; 50 clients' signatures and key agreements take longer than
    their training.
    """

    def __init__(
        self,
        identities: Mapping[str, Identity],
        *,
        requirements: Requirements,
        codec: str,
        length: int,
        ring_bits: int,
        **_bindings: object,
    ) -> None:
        self._least = requirements.least_survivors(len(identities))
        self._codec, self._length, self._bits, self._scale = codec, length, ring_bits, 1.0
        self._sum_M, self._weight = np.zeros(length, dtype=np.uint64), 0.0
        self.sent: tuple[str, ...] = ()

    def open(self) -> None:
        """Nothing to exchange."""

    def send(self, client_id: str, encoded: Encoded, weight: float) -> None:
        """Add one client's residues."""
        self._sum_M += encoded.values_M.astype(np.uint64)
        self._weight, self._scale, self.sent = self._weight + weight, encoded.scale, (*self.sent, client_id)

    def close(self) -> Collected:
        """Return the sum in the ring."""
        if len(self.sent) < self._least:
            raise ThresholdError(f"Only {len(self.sent)} clients sent a vector; at least {self._least} are needed.")
        total = EncodedSum(
            sum_M=self._sum_M & np.uint64((1 << self._bits) - 1),
            codec=self._codec,
            scale=self._scale,
            length=self._length,
            survivors=len(self.sent),
            total_weight=self._weight,
        )
        return Collected(total=total, survivors=self.sent, bytes_up=0, bytes_down=0)


def settings_of(data: str, variant: str, epsilon: float, seed: int, source: Path | None) -> list[str]:
    """Return a cell's overrides of its preset."""
    tuned = TUNED[data]["local" if variant == "local" else "summed"]
    files = (
        [f"data.path={source}/{FILES[data][0]}", f"data.test_path={source}/{FILES[data][1]}"] if data in FILES else []
    )
    return [*COMMON, *VARIANTS[variant], *tuned, *files, f"privacy.target_epsilon={epsilon}", f"seed={seed}"]


def run_cell(data: str, variant: str, epsilon: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one cell through the same function as ``privfed train`` and return its row."""
    placement, more, source = Placement(central=variant == "central"), options.set, options.data
    link = SumWithoutMasks if options.no_masks else rounds.MaskedLink
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(setup, "make_shares", placement),
        patch.object(rounds, "MaskedLink", link),
    ):
        settings = [*settings_of(data, variant, epsilon, seed, source), *more, f"ledger.path={folder}/ledger.sqlite"]
        config = load_config(PRESETS[data], settings)
        started = time.perf_counter()
        receipt = train(config, out=Path(folder) / "run", shared=frozen_work()).receipt
        seconds = time.perf_counter() - started
    release = receipt["views"]["release"]
    return {
        "data": data,
        "variant": variant,
        "epsilon": epsilon,
        "seed": seed,
        "set": list(more),
        "masks": not options.no_masks,
        **receipt["utility"],
        "spent": release["epsilon"],
        "spent_by_survivors": release.get("epsilon_survivors"),
        "noise_over_central": placement.noise,
        "seconds": round(seconds, 1),
        "config_digest": receipt["config_digest"],
    }


def rows() -> list[dict[str, Any]]:
    """Return the finished cells."""
    return [json.loads(line) for line in STORE.read_text().splitlines()] if STORE.exists() else []


def table() -> str:
    """Return the tables of the finished cells, as Markdown."""
    found = [row for row in rows() if not row["set"]]
    lines = [f"| data | epsilon | {' | '.join(VARIANTS)} |", "|---|---|" + "---|" * len(VARIANTS)]
    for data, epsilon in sorted({(row["data"], row["epsilon"]) for row in found}, key=lambda one: (one[0], -one[1])):
        mine = [row for row in found if (row["data"], row["epsilon"]) == (data, epsilon)]
        cells = [_cell([row["accuracy"] for row in mine if row["variant"] == variant]) for variant in VARIANTS]
        lines.append(f"| {data} | {epsilon:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(scores: Sequence[float]) -> str:
    if not scores:
        return "not run"
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{spread} ({len(scores)})"


def main() -> None:
    """Run what is not there yet and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=[[], *PRESETS], help="data sets to run")
    parser.add_argument("--data", type=Path, help="folder with the files of data sets that are not built in")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0, 2.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", choices=VARIANTS, action="append", help="run only this variant (may be repeated)")
    parser.add_argument("--no-masks", action="store_true", help="add in the ring without masks: the same sums, sooner")
    parser.add_argument("--frozen", type=Path, help="keep the frozen model's outputs here, for the next call")
    parser.add_argument("-s", "--set", action="append", default=[], help="a further override of the preset, key=value")
    options = parser.parse_args()
    if any(data in FILES for data in options.sets) and options.data is None:
        parser.error("give the folder of the data files: --data DIR")
    named = ("data", "variant", "epsilon", "seed", "set")
    with tempfile.TemporaryDirectory() as shared:
        share_frozen_work(str(options.frozen or shared))
        for epsilon, seed, data in itertools.product(options.epsilons, options.seeds, options.sets):
            for variant in options.only or VARIANTS:
                wanted = dict(zip(named, (data, variant, epsilon, seed, options.set), strict=True))
                if any(all(row[name] == value for name, value in wanted.items()) for row in rows()):
                    continue
                row = run_cell(data, variant, epsilon, seed, options)
                with STORE.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), file=sys.stderr, flush=True)
    print(table())


if __name__ == "__main__":
    main()
