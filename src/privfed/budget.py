"""``privfed budget``: epsilon, noise or rounds before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from privfed.compression import plugin_of
from privfed.config import RunConfig
from privfed.errors import ConfigError
from privfed.federation.phases import phase_plans
from privfed.privacy.mechanisms import built
from privfed.privacy.plan import PhasePlan, affordable_rounds, make_plan
from privfed.types import VIEWS


def answer(
    config: RunConfig, *, both: bool, clients: int | None = None, shard_size: int | None = None
) -> dict[str, Any]:
    """Return what the run will cost, for each adversary view.

    Data is read only where the answer depends on shard sizes that are not given.

    Args:
        config: The run.
        both: Epsilon and noise are both given: solve for the rounds.
        clients: Number of clients, where the partition does not say it.
        shard_size: Examples of the smallest client.

    Raises:
        ConfigError: If the run has no privacy, or no noise reaches the target.
    """
    if not config.privacy.on:
        raise ConfigError('This run has privacy.unit = "none": there is no budget to compute; set unit = "example".')
    sizes = _sizes(config, clients, shard_size)
    lengths = _lengths(config) if config.privacy.is_distributed else None
    phases = phase_plans(config, sizes, lengths)
    if both:
        rounds = affordable_rounds(config.privacy, phases, masks=config.secagg.masks())
        if rounds < 1:
            raise ConfigError(
                f"epsilon {config.privacy.target_epsilon:g} affords no round at noise multiplier "
                f"{config.privacy.noise_multiplier:g}: raise either."
            )
        server = config.server.model_copy(update={"rounds": rounds})
        config = config.model_copy(update={"server": server})
        phases = phase_plans(config, sizes, lengths)
    plan = make_plan(config.privacy, phases, masks=config.secagg.masks())
    worst = plan.events_by_client[plan.worst_client]
    steps = [
        {
            "phase": phase.name,
            "rounds": phase.rounds,
            "noise_multiplier": event.noise_multiplier,
            "sampling_probability": event.sampling_probability,
            "steps": event.steps,
            **_noise_in_model(config, phase, plan.noise_multiplier),
            **_sums(config, phase, plan.noise_multiplier),
        }
        for phase, event in zip(phases, worst, strict=True)
    ]
    return {**_record(config, plan.epsilon, plan.noise_multiplier), "phases": steps}


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return the answer as text."""
    return [
        f"epsilon {found['epsilon']:.4f} at delta {found['delta']:g} per {found['unit']} ({found['accountant']}, "
        f"{found['neighboring_relation']})",
        *(
            f"{phase['phase']}: {phase['rounds']} rounds, noise multiplier {phase['noise_multiplier']:.4f}, at most "
            f"{phase['steps']} steps at sampling probability {phase['sampling_probability']:.4g}"
            + _model_noise(phase)
            + _ring(phase)
            for phase in found["phases"]
        ),
        *(
            f"{view}: " + (f"epsilon {entry['epsilon']:.4f}" if entry["epsilon"] is not None else "no guarantee")
            for view, entry in found["views"].items()
        ),
    ]


def _noise_in_model(config: RunConfig, phase: PhasePlan, noise: float) -> dict[str, Any]:
    """Return what tells mechanisms of one budget apart: how much of their noise stays in the model.

    That is in clips with ``identity`` alone. With another codec what is noised is the codec's sum, by the bound on what
    one client changes there, which follows from the shapes of what is trained; and what the codec makes of the noise
    afterwards is not in the figure. A codec of two sums a round has sqrt(2) times the noise in each.
    """
    if config.privacy.placed != "central" or config.privacy.unit != "client":
        return {}
    error = built(config.privacy.mechanism).running_error(phase, noise)
    found: dict[str, Any] = {"mechanism": config.privacy.mechanism_name}
    codec = str(getattr(config.compression, "name", ""))
    if codec == "identity":
        return {**found, "noise_in_model": error}
    two = plugin_of(config.compression).declare(config.compression, config.secagg.name == "masked").second_pass
    return {**found, "codec": codec, "noise_in_sums": error * math.sqrt(2 if two else 1)}


def _model_noise(phase: Mapping[str, Any]) -> str:
    if "noise_in_model" in phase:
        noise = phase["noise_in_model"]
        return f" ({phase['mechanism']}; the noise in the model's sum of averages is {noise:.4f} clips)"
    if "noise_in_sums" in phase:
        return (
            f" ({phase['mechanism']}; the noise in the averages of {phase['codec']}, added up and before they are "
            f"decoded, is {phase['noise_in_sums']:.4f} times the most that one client changes there)"
        )
    return ""


def _sums(config: RunConfig, phase: PhasePlan, noise: float) -> dict[str, Any]:
    """Return what the masked sums of a phase look like under distributed noise."""
    if not config.privacy.is_distributed:
        return {}
    from privfed.privacy.discrete.planning import discrete_params

    params = discrete_params(config.privacy, phase, noise)
    return {
        "mechanism": params.noise,
        "length": params.length,
        "n_min": params.n_min,
        "scale": params.scale,
        "ring_bits": params.ring_bits,
        "local_variance": params.local_variance,
        "overflow_probability": params.overflow_probability(params.n),
    }


def _ring(phase: Mapping[str, Any]) -> str:
    if "ring_bits" not in phase:
        return ""
    return (
        f" ({phase['mechanism']}; {phase['length']} values of {phase['ring_bits']} bits, which overflow with "
        f"probability at most {max(phase['overflow_probability'], 1e-99):.1g} a round; at least {phase['n_min']} "
        "survivors)"
    )


def _lengths(config: RunConfig) -> dict[str, int]:
    """Return how many values are sent in each phase: what integer noise costs depends on it, so the model is loaded."""
    from privfed.federation import canaries, material, workbench

    material.check_before_data(config)
    return workbench.planned_lengths(config, canaries.expected(config))


def _sizes(config: RunConfig, clients: int | None, shard_size: int | None) -> dict[str, int]:
    count = clients or getattr(config.partition, "clients", None)
    by_size = config.client.sampling_probability is None
    if count and (not by_size or shard_size or config.privacy.unit == "client"):
        return {f"client_{i}": shard_size or 1 for i in range(count)}
    from privfed.federation.canaries import expected

    return {shard.client_id: len(shard) for shard in expected(config).shards}


def _record(config: RunConfig, epsilon: float, noise: float) -> dict[str, Any]:
    privacy = config.privacy
    common = {
        "delta": privacy.target_delta,
        "noise_multiplier": noise,
        "rounds": config.server.rounds,
        "accountant": privacy.accountant,
    }
    protected = {"local": VIEWS, "central": ("release",), "distributed": ("aggregate", "release")}[privacy.placed]
    return {
        "epsilon": epsilon,
        **common,
        "unit": privacy.unit,
        "neighboring_relation": privacy.neighboring_relation,
        "views": {view: {"epsilon": epsilon if view in protected else None, **common} for view in VIEWS},
    }
