"""What a site lets a server have: its caps and conditions, checked at the site against the run that is asked for.

The server cannot switch any of it off: the configuration that is checked is the one that the site then runs, with the
site's own code.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from privfed.compression import CODECS
from privfed.errors import BudgetExceededError, ConfigError
from privfed.privacy.accountant import Events
from privfed.privacy.ledger import Ledger
from privfed.privacy.ledger_cost import cost
from privfed.run_config import RunConfig
from privfed.table import Table
from privfed.types import PrivacyEvent, Unit


class Caps(Table):
    """The ``[caps]`` table: the most that may be spent on this site's data, by all runs of all servers together.

    Attributes:
        epsilon: Over all projects.
        delta: At which epsilon is stated.
        unit: Of the caps: ``example`` or ``client``.
        projects: By name of a project (``ledger.project`` of a run) its own cap. Where any is given, a project that is
            not named is refused: names are the server's choice.
    """

    epsilon: float = Field(gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    unit: Unit = "example"
    projects: dict[str, float] = Field(default_factory=dict)


class Accept(Table):
    """The ``[accept]`` table: which runs the site takes part in.

    Attributes:
        models: Names of models (``model.name``); empty for none.
        bundles: SHA-256 of the app bundles that the server's Flower run may carry, as hex; empty for any. The site runs
            its own installed code in any case and never the bundle's.
        min_cohort: Fewest clients in a round, and with secure aggregation in a sum.
        secagg: Only runs with secure aggregation.
        unprotected: Also runs with ``privacy.unit = "none"``.
        trusted_server: Also runs whose noise the server adds (``placement = "central"``). The site cannot check it, so
            the plan of the whole run is charged at once.
        reproducible_noise: Also runs whose noise anyone can compute: for tests on public data only.
    """

    models: list[str] = Field(default_factory=list)
    bundles: list[str] = Field(default_factory=list)
    min_cohort: int = Field(default=2, ge=1)
    secagg: bool = True
    unprotected: bool = False
    trusted_server: bool = False
    reproducible_noise: bool = False


class Policy(Table):
    """Both."""

    caps: Caps | None = None
    accept: Accept = Accept()


def refusal(policy: Policy, config: RunConfig, clients: int) -> str | None:
    """Return why the site takes no part in a run, as far as its configuration tells; None where nothing speaks against.

    Args:
        policy: The site's.
        config: The run.
        clients: Clients in the roster.
    """
    accept, privacy = policy.accept, config.privacy
    cohort = config.server.cohort_size or clients
    model = config.model.name
    if model not in accept.models:
        return f"model.name = {model!r} is not on this site's list (accept.models = {accept.models})"
    if accept.secagg and config.secagg.name != "masked":
        return f'secagg.name = "{config.secagg.name}", and this site takes part under secure aggregation only'
    requirements = config.secagg.requirements()
    least = requirements.least_survivors(cohort) if config.secagg.name == "masked" else cohort
    if least < accept.min_cohort:
        return f"a sum of {least} clients is below this site's minimum (accept.min_cohort = {accept.min_cohort})"
    if not privacy.on and not accept.unprotected:
        return 'privacy.unit = "none", and this site takes part in protected runs only (accept.unprotected)'
    if privacy.on and privacy.placed == "central" and not accept.trusted_server:
        return "the noise is the server's to add, whom this site does not trust to (accept.trusted_server)"
    if privacy.on and privacy.reproducible_noise and not accept.reproducible_noise:
        return "privacy.reproducible_noise = true is noise that anyone can compute (accept.reproducible_noise)"
    return unsupported(config)


def unsupported(config: RunConfig) -> str | None:
    """Return why a run cannot be had over a network in this version; None where it can."""
    name = str(getattr(config.compression, "name", ""))
    if CODECS.get(name).declare(config.compression, config.secagg.name == "masked").second_pass:
        return f"compression.name = {name!r} sends twice a round: it runs in one process"
    if config.server.personal:
        return "server.personal keeps parts that only their clients could score and save: it runs in one process"
    if config.server.meter:
        return "server.meter reads single clients' messages: it runs in one process"
    return None


def approve(
    policy: Policy,
    ledger: Ledger,
    plan: Mapping[str, Events],
    *,
    run_id: str,
    project: str,
    data_digest: str,
    partition_digest: str,
) -> None:
    """Set the caps in the ledger and check the whole run against them, before anything is computed.

    Args:
        policy: The site's.
        ledger: The site's.
        plan: All that the run will have charged each of the site's clients.
        run_id: The run.
        project: Its project.
        data_digest: The site's data.
        partition_digest: Their division.

    Raises:
        BudgetExceededError: If the run passes a cap on top of what is spent.
        ConfigError: If its project has no cap where others have.
    """
    caps = policy.caps
    if caps is not None:
        ledger.set_cap(data_digest=data_digest, unit=caps.unit, epsilon=caps.epsilon, delta=caps.delta)
        if caps.projects:
            _check_project(caps, ledger, plan, project, run_id, data_digest, partition_digest)
    ledger.approve(plan, run_id=run_id, data_digest=data_digest, partition_digest=partition_digest)


def _check_project(
    caps: Caps,
    ledger: Ledger,
    plan: Mapping[str, Events],
    project: str,
    run_id: str,
    data_digest: str,
    partition_digest: str,
) -> None:
    if project not in caps.projects:
        raise ConfigError(
            f"ledger.project = {project!r} has no cap at this site, which knows {', '.join(sorted(caps.projects))}."
        )
    events: dict[str, dict[str, list[PrivacyEvent]]] = {partition_digest: {c: [*e] for c, e in plan.items()}}
    for entry in ledger.entries(data_digest=data_digest):
        charge = entry.charge
        if charge.project == project and charge.run_id != run_id:  # this run's charges are in its plan
            events.setdefault(charge.partition_digest, {}).setdefault(charge.client_id, []).append(charge.event)
    limit = caps.projects[project]
    value = cost(
        {partition: {client: tuple(each) for client, each in found.items()} for partition, found in events.items()},
        unit=caps.unit,
        delta=caps.delta,
        limit=limit,
    )
    if value > limit:
        raise BudgetExceededError(
            f"The run would bring project {project!r} to epsilon {value:.4g} at delta {caps.delta:g} per {caps.unit}; "
            f"this site's cap for it is {limit:g}: run fewer steps, add noise or have the cap raised."
        )
