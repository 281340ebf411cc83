"""What a codec cannot be combined with, from what it declares. Each sentence names both sides and what works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from privfed.compression import Properties, plugin_of
from privfed.errors import ConfigError
from privfed.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The rest of a run, as far as a codec can contradict it.

    Attributes:
        unit: The privacy unit.
        central: Whether noise is added to a sum of updates, at the server.
        mechanism: Name of the mechanism that does.
        correlated: Whether that noise spans rounds.
        two_sums: Whether it can noise two sums in a round.
        rule: Name of the aggregation rule.
        individual: Whether it needs each client's update.
        variates: Whether it takes averages of updates for averages of gradients.
        weighted: Whether clients are weighted.
        meter: Whether a meter reads each client's update.
        layers: Whether clients train different tensors.
        coordinatewise: Whether the rule looks at each value by itself.
        tuning: Name of the tuning.
        scores: Whether it trains the scores of a mask.
    """

    masked: bool
    unit: str
    central: bool
    mechanism: str
    correlated: bool
    two_sums: bool
    rule: str
    individual: bool
    variates: bool
    weighted: bool
    meter: bool
    layers: bool = False
    coordinatewise: bool = False
    tuning: str = ""
    scores: bool = False


def check_codec(config: Table, setting: Setting) -> None:
    """Refuse what the configured codec cannot be combined with.

    Raises:
        ConfigError: A sentence that names both sides and the nearest that works.
    """
    found, given = plugin_of(config).declare(config, setting.masked), _given(config)
    if found.scores and not setting.scores:
        raise ConfigError(
            f'{given} with tuning.name = "{setting.tuning}": the codec sends draws of a mask, and this tuning trains '
            'no scores of one; use tuning.name = "bernoulli_mask", or compression.name = "stochastic_quantizer".'
        )
    _check_sum(config, found, setting)
    if setting.central:
        _check_noise(found, given, setting)
    _check_rule(found, given, setting)
    if not found.separable and setting.meter:
        raise ConfigError(
            f"{given} with server.meter = true, which reads the update of each client: this codec decodes sums only; "
            'set server.meter = false, or use compression.name = "random_k".'
        )
    if setting.layers:
        _check_layers(found, given)


def check_downlink(config: Table) -> None:
    """Refuse a codec that cannot encode a broadcast.

    Raises:
        ConfigError: A sentence that names what can.
    """
    if not plugin_of(config).declare(config, False).downlink:
        raise ConfigError(
            f'downlink.name = "{_name(config)}" cannot encode a broadcast, which every client has to decode by itself '
            'and alone; use downlink.name = "stochastic_quantizer", "cast" or "identity".'
        )


def largest_carried(config: Table, *, masked: bool) -> float | None:
    """Return the largest norm of an update that a codec encodes whatever the update; None for no limit."""
    return plugin_of(config).carries(config, masked)


def _check_sum(config: Table, found: Properties, setting: Setting) -> None:
    """Refuse sums that mean nothing: in a ring, or weighted."""
    if setting.masked and not found.summable:
        place, at_fault = _not_summable(config)
        instead = plugin_of(at_fault).instead
        raise ConfigError(
            f'{place}.name = "{_name(at_fault)}" with secagg.name = "masked": its messages do not add up in a ring; '
            f'use {place}.name = "{instead}", or secagg.name = "none".'
        )
    if setting.weighted and not found.scales:
        raise ConfigError(
            f'{_given(config)} with server.weighting = "examples": its message is the same whatever the weight; set '
            'server.weighting = "uniform".'
        )


def _check_noise(found: Properties, given: str, setting: Setting) -> None:
    """Refuse noise on a sum that no bound holds for, or that the mechanism does not know how to noise."""
    if not found.bounded:
        raise ConfigError(
            f'{given} with privacy.unit = "{setting.unit}" noised at the server: noise needs a bound on what one '
            'client changes in the sum, and this codec gives none; use compression.name = "identity".'
        )
    if found.second_pass and not setting.two_sums:
        raise ConfigError(
            f'{given} with privacy.mechanism = "{setting.mechanism}": the codec releases two sums a round and the '
            'mechanism noises one; use mechanism = "gaussian", or compression.name = "identity".'
        )
    if setting.correlated and not found.steady:
        raise ConfigError(
            f'{given} with privacy.mechanism = "{setting.mechanism}": the mechanism takes back noise of earlier rounds '
            'and this codec sends other values in each; use mechanism = "gaussian", or compression.name = "identity".'
        )


def _check_rule(found: Properties, given: str, setting: Setting) -> None:
    """Refuse what the aggregation rule cannot read in the codec's messages or sum."""
    if not found.separable and setting.individual:
        raise ConfigError(
            f'{given} with server.aggregation = "{setting.rule}", which needs the update of each client: this codec '
            'decodes sums only; use compression.name = "random_k", or aggregation = "fedavg".'
        )
    if not found.shared_support and setting.coordinatewise:
        raise ConfigError(
            f'{given} with server.aggregation = "{setting.rule}": each client sends other values and the rule would '
            "take the others for 0, of which most are, and outvote the rest with them; use compression.name = "
            '"random_k", or aggregation = "geometric_median".'
        )
    averages = found.linear or (found.server_state and not found.scores)
    if setting.variates and not averages:
        raise ConfigError(
            f'{given} with server.aggregation = "{setting.rule}": what the server decodes is no average of updates, '
            'from which the control variates are computed; use a codec that averages, such as "stochastic_quantizer", '
            'or aggregation = "fedavg".'
        )


def _check_layers(found: Properties, given: str) -> None:
    """Refuse sums that cannot be divided tensor by tensor, or to which a client adds to what it did not train."""
    if found.server_state or found.second_pass or not found.linear:
        raise ConfigError(
            f"{given} with server.layers: what the server decodes is not linear in the sum of the messages, so it "
            "cannot be divided by how many clients trained each tensor; use compression.name = "
            '"stochastic_quantizer", "random_k" or "identity", or layers = [].'
        )
    if not found.scales:
        raise ConfigError(
            f"{given} with server.layers: its message on a layer that a client did not train is as large as on one "
            'that it did; use compression.name = "stochastic_quantizer" or "identity", or layers = [].'
        )


def _not_summable(config: Any) -> tuple[str, Table]:
    """Return the place and table of the innermost codec because of which sums mean nothing."""
    place = "compression"
    while (inner := getattr(config, "inner", None)) is not None and not plugin_of(inner).declare(inner, True).summable:
        place, config = f"{place}.inner", inner
    return place, config


def _name(config: Table) -> str:
    return str(getattr(config, "name", ""))


def _given(config: Table) -> str:
    return f'compression.name = "{_name(config)}"'
