"""From the survivors' shares to the keys of the masks that are left in the sum.

Source: Bonawitz et al. 2017, figure 4, round 4 (server). Checking each secret against what its owner advertised is
this project's, for the seeds by a commitment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privfed.errors import ShareError, ThresholdError
from privfed.secagg import keys as k
from privfed.secagg.shamir import combine_bytes, lagrange_weights
from privfed.secagg.wire import Card, Wire

Replies = Mapping[int, Mapping[int, bytes]]


def mask_keys(
    wire: Wire, cards: Mapping[int, Card], sharers: Collection[int], survivors: Collection[int], replies: Replies
) -> tuple[list[bytes], list[bytes]]:
    """Return the keystream keys to add to the sum of the masked vectors and those to subtract from it.

    Args:
        wire: The session.
        cards: What each client advertised.
        sharers: Who shared.
        survivors: Whose vector is in the sum.
        replies: Who answered -> owner -> share.

    Raises:
        ThresholdError: If too few holders of some client's shares answered.
        ShareError: If shares do not give the secret that was advertised.
    """
    recovery = _Recovery(wire, cards, replies)
    minus = [recovery.self_mask(owner) for owner in sorted(survivors)]
    plus: list[bytes] = []
    for owner in sorted(set(sharers) - set(survivors)):
        private, near = recovery.masking_key(owner), wire.near(owner, survivors)
        own = (wire.name(owner), cards[owner].keys.masking)
        for other in near:
            peer = (wire.name(other), cards[other].keys.masking)
            # of two clients the one with the lower number added their mask, so the survivor did if it is that one
            (plus if other > owner else minus).append(k.pairwise_mask_key(private, wire.params.scope, own, peer))
    return plus, minus


class _Recovery:
    """Joins shares; weights are worked out once for each set of holders."""

    def __init__(self, wire: Wire, cards: Mapping[int, Card], replies: Replies) -> None:
        self._wire, self._cards, self._replies = wire, cards, replies
        self._weights: dict[tuple[int, ...], list[int]] = {}

    def self_mask(self, owner: int) -> bytes:
        """Return the key of a survivor's self mask, having checked its seed."""
        scope, name = self._wire.params.scope, self._wire.name(owner)
        seed = self._secret(owner, "self-mask seed")
        if not k.same(k.commit_seed(seed, scope, name), self._cards[owner].keys.seed_commitment):
            raise self._wrong(owner, "self-mask seed")
        return k.self_mask_key(seed, scope, name)

    def masking_key(self, owner: int) -> X25519PrivateKey:
        """Return a dropped client's masking key, having checked it."""
        private = k.load_private(self._secret(owner, "masking key"))
        if not k.same(private.public_key().public_bytes_raw(), self._cards[owner].keys.masking):
            raise self._wrong(owner, "masking key")
        return private

    def _secret(self, owner: int, what: str) -> bytes:
        """Return a secret from the first ``threshold`` shares of it."""
        needed = self._wire.params.threshold
        holders = tuple(one for one in self._wire.graph.holders(owner) if owner in self._replies.get(one, {}))
        if len(holders) < needed:
            raise ThresholdError(
                f"Only {len(holders)} holders of shares of client {self._wire.name(owner)!r} answered;"
                f" {needed} are needed."
            )
        chosen = holders[:needed]
        if chosen not in self._weights:
            self._weights[chosen] = lagrange_weights([holder + 1 for holder in chosen])
        try:
            return combine_bytes(self._weights[chosen], [self._replies[holder][owner] for holder in chosen])
        except ValueError as error:
            raise self._wrong(owner, what) from error

    def _wrong(self, owner: int, what: str) -> ShareError:
        """Return the error for a recovered secret that is not the one its owner advertised."""
        name = self._wire.name(owner)
        return ShareError(
            f"The shares of client {name!r} do not give the {what} that it advertised: it dealt, or another"
            " client returned, a wrong share. No sum is released.",
            peer=name,
        )
