"""From a finished run to the facts its receipt states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from privfed.config import RunConfig
from privfed.privacy.accountant import epsilon, epsilon_curve, gaussian_mu
from privfed.privacy.mechanisms import built
from privfed.privacy.noise import NOISE_DESCRIPTION
from privfed.privacy.plan import Plan
from privfed.report.receipt import ReceiptFacts, ViewFacts
from privfed.report.survivors import survivors_epsilon
from privfed.types import PrivacyEvent, View

if TYPE_CHECKING:
    from privfed.federation.engines.in_process import Outcome
    from privfed.federation.material import Material
    from privfed.privacy.ledger import Ledger

CLIENT_SCORES = ("clients_mean", "clients_worst_tenth")
INTEGER_NOISE = (
    "integers from tables of the law's probabilities and a stream cipher's random bits; the distance to the exact "
    "law is charged to delta"
)
ONE_UPDATE = (
    "Under secure aggregation nobody sees a single client's update, and alone it has only that client's share of the "
    "noise: this view has no guarantee of its own."
)
_DELTAS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


def receipt_facts(
    *,
    config: RunConfig,
    folder_id: tuple[str, str],
    material: Material,
    plan: Plan | None,
    ledger: Ledger,
    outcome: Outcome,
    adapter_digest: str,
    sentinels: Mapping[str, str],
    versions: Mapping[str, str],
    notes: Sequence[str] = (),
) -> ReceiptFacts:
    """Return the facts of a finished run; epsilon comes from the ledger's events, not from the plan.

    Args:
        config: The run.
        folder_id: (run id, time of creation).
        material: Data and division.
        plan: The run's plan, or None without privacy.
        ledger: The data holder's ledger.
        outcome: What training left behind.
        adapter_digest: SHA-256 of the adapter's weights.
        sentinels: Results of the self-checks.
        versions: Versions of what ran.
        notes: What there is to say about the result, beside the data's own notes.
    """
    privacy = config.privacy
    run_id, created = folder_id
    # records of who survived have no steps, and are nobody's cost
    events = {client: found for client, found in ledger.events_of(run_id).items() if found} if plan else {}
    per_client = _per_client(
        events, privacy.target_delta - (plan.lost_rounds_delta if plan else 0.0), privacy.accountant
    )
    worst = max(per_client, key=lambda c: per_client[c]) if per_client else None
    score = outcome.score
    # no loss: the other metrics say it, and a loss in a receipt would be taken for one of training
    utility = {name: value for name, value in score.metrics.items() if name != "loss"}
    utility["n_test"] = float(score.n)
    if "base_perplexity" in outcome.totals:
        utility["base_perplexity"] = outcome.totals["base_perplexity"]
    if outcome.probe_accuracy is not None:
        utility["probe_accuracy"] = outcome.probe_accuracy
    utility |= {name: outcome.totals[name] for name in CLIENT_SCORES if name in outcome.totals}
    source: Literal["none", "reproducible", "csprng"] = "reproducible" if privacy.reproducible_noise else "csprng"
    if not privacy.on:
        source = "none"
    return ReceiptFacts(
        run_id=run_id,
        created=created,
        config_digest=config.digest(),
        data_name=material.dataset.name,
        data_digest=material.dataset.digest,
        partition_digest=material.partition_digest,
        ledger_head=ledger.head(),
        unit=privacy.unit,
        placement=privacy.placed,
        secagg=config.secagg.name == "masked",
        relation=privacy.neighboring_relation,
        accountant=privacy.accountant,
        delta=privacy.target_delta,
        mechanism=_mechanism(config),
        noise_multiplier=plan.noise_multiplier if plan else None,
        l2_clip_norm=privacy.l2_clip_norm,
        noise_source=source,
        noise_description=INTEGER_NOISE if privacy.is_distributed else NOISE_DESCRIPTION,
        sampling=_sampling(config),
        views=_views(
            config,
            plan,
            events.get(worst or "", ()),
            per_client.get(worst or ""),
            survivors_epsilon(ledger.entries(run_id=run_id), privacy.target_delta) if privacy.is_distributed else None,
        ),
        per_client={} if privacy.unit == "client" else per_client,
        events=events.get(worst or "", ()),
        rounds_planned=config.server.rounds,
        rounds_done=outcome.state.round,
        clients=len(material.shards),
        versions=versions,
        utility=utility,
        adapter_digest=adapter_digest,
        beats_probe=None if outcome.probe_accuracy is None else score.value > outcome.probe_accuracy,
        sentinels=sentinels,
        notes=(*material.notes, *notes),
        delta_set_aside=plan.lost_rounds_delta if plan else 0.0,
    )


def _per_client(events: Mapping[str, tuple[PrivacyEvent, ...]], delta: float, accountant: str) -> dict[str, float]:
    """Return each client's epsilon; clients with the same events share one accounting."""
    known: dict[tuple[PrivacyEvent, ...], float] = {}
    for found in events.values():
        if found not in known:
            known[found] = epsilon(found, delta, accountant=accountant, fine=True)  # type: ignore[arg-type]
    return {client: known[found] for client, found in events.items()}


def _mechanism(config: RunConfig) -> str:
    if config.privacy.distributed is not None and config.privacy.is_distributed:
        name = config.privacy.distributed.noise.replace("_", " ")
        return {
            "client": f"DP-FedAvg with distributed noise: each client adds a share of {name} noise to its clipped "
            "update in integers, before masking",
            "example": f"DP-SGD with distributed noise: each client adds a share of {name} noise to its "
            "Poisson-sampled sum of clipped per-example gradients in integers, before masking",
        }[config.privacy.unit]
    if config.privacy.unit == "client":
        return built(config.privacy.mechanism).description()
    if config.privacy.unit == "example":
        return "DP-SGD: Gaussian noise on Poisson-sampled sums of clipped per-example gradients"
    return "none"


def _sampling(config: RunConfig) -> Literal["poisson", "scheduled", "shuffled"]:
    if config.privacy.unit == "client":
        return "scheduled" if config.privacy.is_distributed else built(config.privacy.mechanism).sampling
    return "poisson" if config.privacy.on else "shuffled"


def _views(
    config: RunConfig,
    plan: Plan | None,
    worst: Sequence[PrivacyEvent],
    value: float | None,
    survivors: float | None,
) -> dict[View, ViewFacts]:
    if plan is None or value is None:
        return {}
    delta = config.privacy.target_delta
    curve = tuple(
        (eps, d + plan.lost_rounds_delta)
        for d, eps in _curve_points(worst, [*[d for d in _DELTAS if d != delta], delta], config.privacy.accountant)
    )
    mu = gaussian_mu(worst)

    def view(*assumptions: str) -> ViewFacts:
        return ViewFacts(
            epsilon=value,
            curve=curve,
            mu=mu.mu if mu else None,
            mu_exact=mu.exact if mu else False,
            assumptions=assumptions,
            epsilon_survivors=survivors,
        )

    if config.privacy.is_distributed:
        shared = view(*_distributed_assumptions(config))
        return {"individual": ViewFacts(epsilon=None, why=ONE_UPDATE), "aggregate": shared, "release": shared}

    if config.privacy.unit == "client":
        trusted = "The server adds the noise and is trusted to: this view has no guarantee of its own."
        return {
            "individual": ViewFacts(epsilon=None, why=trusted),
            "aggregate": ViewFacts(epsilon=None, why=trusted),
            "release": view(*_client_assumptions(config, plan)),
        }
    post = "Post-processing of each client's own noisy steps; other clients' noise is not counted in."
    leaving = "Whether a client drops out of a round does not depend on its data."
    return {
        "individual": view("Each client adds its own noise before anything leaves it.", leaving),
        "aggregate": view(post, leaving),
        "release": view(post, leaving),
    }


def _client_assumptions(config: RunConfig, plan: Plan) -> tuple[str, ...]:
    found = (
        "Which clients drop out of a round does not depend on their data.",
        *built(config.privacy.mechanism).assumptions(),
    )
    if config.secagg.name == "masked":
        found += (
            f"No round loses more than a share of {config.secagg.dropped:g} of its clients: whether it is then lost "
            "could depend on one of them.",
        )
    if plan.lost_rounds_delta:
        found += (f"{plan.lost_rounds_delta:.1g} of delta is set aside for cohorts that cannot be masked.",)
    return found


def _distributed_assumptions(config: RunConfig) -> tuple[str, ...]:
    found = [
        f"At most a share of {config.secagg.corrupt:g} of a cohort adds no noise, or tells the server what it added.",
        "epsilon holds if no more than n_min clients survive any round; epsilon_survivors is for those that did.",
        "Whether a client takes part in a round, and whether it drops out, does not depend on its data.",
        "Secure aggregation reveals one sum a round: the set of survivors is on record before it is unmasked.",
    ]
    if config.privacy.unit == "client":
        found.append("A client that is absent stands for one that takes part with an update of zeros.")
    return tuple(found)


def _curve_points(
    events: Sequence[PrivacyEvent], deltas: Sequence[float], accountant: str
) -> list[tuple[float, float]]:
    """Return (delta, epsilon) pairs."""
    points = epsilon_curve(events, sorted(deltas), accountant=accountant)  # type: ignore[arg-type]
    return [(d, e) for d, e in points]
