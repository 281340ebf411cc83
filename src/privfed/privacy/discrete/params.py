"""What the parties to a distributed sum agree on, and what follows from it for privacy and for overflow.

Shape legend: D values of a client's vector; M encoded values (D, or the next power of two if rotated).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from privfed.errors import ConfigError, RoundError
from privfed.hadamard import padded_length
from privfed.privacy.discrete.accounting import DiscreteEvent
from privfed.privacy.discrete.discrete_gaussian import SMALLEST_SHARE_VARIANCE
from privfed.privacy.discrete.laws import LARGEST_VARIANCE, LawName
from privfed.privacy.discrete.sampler import LARGEST_DISTANCE
from privfed.privacy.discrete.sensitivity import NORM_SLACK, overflow_bound, rounded_l1, rounded_l2_squared
from privfed.types import Relation, Unit

CLIENT_BETA = math.exp(-0.5)
"""For conditional rounding: a draw is within the bound with probability 1 - beta at least, and is else repeated."""
EXAMPLE_BETA = 1e-14
"""For plain rounding: charged to delta at each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscreteParams:
    """What all clients and the server agree on; public.

    Attributes:
        length: D, the length of a client's vector.
        l2_clip_norm: Bound on the L2 norm of what one *unit* adds to the real sum.
        contribution_norm: Bound on the L2 norm of one client's vector, to which it is projected. At client level it
            is the clip norm; at example level a bound on the sum of a client's clipped examples, which costs ring
            bits, not privacy.
        scale: Integer steps per unit of the real vector; see ``sensitivity.recommended_scale``.
        ring_bits: Bits of a residue, at most 32.
        local_variance: Of each client's share of the noise, in steps squared (the discrete Gaussian's sigma^2); 0 is no
            noise and no privacy.
        n: Clients that start a round.
        n_min: The fewest survivors for which a sum is revealed.
        corrupt: Fraction of the n whose noise counts for nothing, for it may be known or missing.
        dropped: Fraction of the n that may drop out.
        unit: ``"client"`` or ``"example"``.
        noise: Law of the shares.
        beta: See ``mechanism``; None takes ``CLIENT_BETA`` or ``EXAMPLE_BETA`` (``effective_beta``).
        rotate: Whether to apply the randomised Hadamard rotation.
        rotation_seed: Public randomness of the rotation, fresh for each round and not chosen by anyone who chooses
            updates.

    Raises:
        ConfigError: For values out of range, and for parameters under which no honest noise need survive.
    """

    length: int
    l2_clip_norm: float
    contribution_norm: float
    scale: float
    ring_bits: int
    local_variance: float
    n: int
    n_min: int
    corrupt: float
    dropped: float
    unit: Unit
    noise: LawName = "skellam"
    beta: float | None = None
    rotate: bool = False
    rotation_seed: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot hold."""
        _check_ranges(self)
        corrupt = corrupt_clients(self.n, self.corrupt)
        if self.n_min <= corrupt:
            raise ConfigError(
                f"n_min = {self.n_min} survivors may all be among the {corrupt} clients declared corrupt, so that no "
                f"honest noise is left: raise n_min above {corrupt}."
            )
        most = expected_survivors(self.n, self.dropped)
        if self.n_min > most:
            raise ConfigError(
                f"n_min = {self.n_min} is more than the {most} clients left when the declared fraction of "
                f"{self.dropped:g} drops out, so that no such round could be revealed: lower n_min or dropped."
            )
        if self.noise == "discrete_gaussian" and 0 < self.local_variance < SMALLEST_SHARE_VARIANCE:
            raise ConfigError(
                f"A share of discrete Gaussian noise has variance {self.local_variance:g}, expected at least "
                f'{SMALLEST_SHARE_VARIANCE:g}: raise the scale, or take noise = "skellam".'
            )

    @property
    def encoded_length(self) -> int:
        """M."""
        return padded_length(self.length) if self.rotate else self.length

    @property
    def effective_beta(self) -> float:
        """Beta, or its default for the unit."""
        if self.beta is not None:
            return self.beta
        return CLIENT_BETA if self.unit == "client" else EXAMPLE_BETA

    @property
    def integer_l2_squared(self) -> int:
        """Bound on the squared L2 norm of what one unit adds to the integer sum."""
        steps = self.l2_clip_norm * self.scale * (1 + NORM_SLACK)
        return rounded_l2_squared(steps, self.encoded_length, self.effective_beta)

    @property
    def integer_l2(self) -> float:
        """Its square root."""
        return math.sqrt(self.integer_l2_squared)

    @property
    def integer_l1(self) -> float:
        """Bound on the L1 norm of what one unit adds to the integer sum."""
        return rounded_l1(self.integer_l2_squared, self.encoded_length)

    def overflow_probability(self, survivors: int) -> float:
        """Return a bound on the probability that any value of the sum of ``survivors`` vectors wraps around.

        For survivors that keep to the norm bound; with a rotation, over the choice of its seed.
        """
        return overflow_bound(
            clients=survivors,
            contribution=self.contribution_norm * self.scale,
            variance=survivors * self.local_variance,
            noise=self.noise,
            length=self.encoded_length,
            ring_bits=self.ring_bits,
            rotated=self.rotate,
        )

    def event(
        self,
        survivors: int,
        *,
        sampling_probability: float = 1.0,
        steps: int = 1,
        relation: Relation = "add_or_remove_one",
    ) -> DiscreteEvent:
        """Return what a sum over ``survivors`` clients did to one unit; ``survivors = n_min`` is what can be promised.

        Only the noise of honest survivors counts: all corrupt clients are taken to have survived.

        Raises:
            RoundError: If there are fewer survivors than ``n_min``.
            ConfigError: For a sampling probability, steps or relation out of range.
        """
        if not self.n_min <= survivors <= self.n:
            raise RoundError(
                f"Got {survivors} survivors, expected {self.n_min} to {self.n}: a smaller sum must not be revealed."
            )
        honest = honest_survivors(survivors, self.n, self.corrupt)
        return self.event_at(
            honest * self.local_variance,
            honest,
            sampling_probability=sampling_probability,
            steps=steps,
            relation=relation,
        )

    def event_at(
        self, variance: float, honest: int, *, sampling_probability: float, steps: int, relation: Relation
    ) -> DiscreteEvent:
        """Return the event for ``honest`` shares that make up this ``variance``, whatever ``local_variance`` is.

        Raises:
            ConfigError: For a sampling probability, steps or relation out of range.
        """
        return DiscreteEvent(
            mechanism=self.noise,
            variance=variance,
            shares=honest,
            length=self.encoded_length,
            l1=self.integer_l1,
            l2=self.integer_l2,
            unit=self.unit,
            sampling_probability=sampling_probability,
            steps=steps,
            relation=relation,
            rounding_delta=0.0 if self.unit == "client" else self.effective_beta,
            sampler_distance=honest * self.encoded_length * LARGEST_DISTANCE,
        )


def corrupt_clients(n: int, corrupt: float) -> int:
    """Return how many of ``n`` clients may be corrupt: the fraction, rounded up, as secure aggregation counts them."""
    return math.ceil(corrupt * n - 1e-9)


def honest_survivors(survivors: int, n: int, corrupt: float) -> int:
    """Return how many honest clients are left if all corrupt ones of the ``n`` survived."""
    return max(0, survivors - corrupt_clients(n, corrupt))


def expected_survivors(n: int, dropped: float) -> int:
    """Return how many of ``n`` clients are left when the declared fraction drops out, rounded down."""
    return math.floor((1 - dropped) * n + 1e-9)


def _check_ranges(params: DiscreteParams) -> None:
    for name in ("l2_clip_norm", "contribution_norm", "scale"):
        value = getattr(params, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"Expected a positive, finite {name}, got {value}.")
    if not 0 <= params.local_variance <= LARGEST_VARIANCE:
        raise ConfigError(f"Expected a local_variance in [0, 2^44], got {params.local_variance:g}: take another scale.")
    if params.unit not in ("client", "example"):
        raise ConfigError(f"Expected the unit 'client' or 'example', got {params.unit!r}.")
    if params.unit == "client" and params.contribution_norm != params.l2_clip_norm:
        raise ConfigError("At client level contribution_norm is the clip norm: give both the same value.")
    if params.contribution_norm < params.l2_clip_norm:
        raise ConfigError("Expected a contribution_norm of at least l2_clip_norm: a client may hold one full example.")
    if not 2 <= params.ring_bits <= 32:
        raise ConfigError(f"Expected ring_bits from 2 to 32, got {params.ring_bits}.")
    if not 1 <= params.n_min <= params.n:
        raise ConfigError(f"Expected n_min from 1 to n = {params.n}, got {params.n_min}.")
    if not (0 <= params.corrupt < 1 and 0 <= params.dropped < 1 and params.corrupt + params.dropped < 1):
        raise ConfigError(
            "Expected fractions corrupt and dropped that leave honest survivors, "
            f"got {params.corrupt} and {params.dropped}."
        )
    if params.length < 1:
        raise ConfigError(f"Expected a length of at least 1, got {params.length}.")
    if params.rotate != bool(params.rotation_seed):
        raise ConfigError("Give a rotation_seed exactly where rotate is set.")
    if not 0 <= params.effective_beta < 1:
        raise ConfigError(f"Expected beta in [0, 1), got {params.beta}.")
    if params.contribution_norm * params.scale >= 2.0**30:
        raise ConfigError("A contribution of 2^30 steps or more fits no ring: lower the scale.")
