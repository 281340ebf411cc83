"""RoLoRA: B in odd rounds, A in even rounds; each average is exact.

Chen et al. 2024, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", arXiv 2409.02346.
While one factor stands still the product is linear in the other, so averaging is exact, noise has no product term,
and half as many values are noised and sent. B goes first: it starts at 0, and A has no gradient before it moved.
Everything else that is trained (a head) is trained in every round.
"""

from __future__ import annotations

from collections.abc import Sequence

from privfed.rules import LORA_TUNINGS, RULES, Pair, Rule


@RULES.register("rolora")
class RoLora(Rule):
    """Alternates the factors."""

    takes = LORA_TUNINGS
    ranks = True
    alternates = True

    def resting(self, round_number: int, pairs: Sequence[Pair]) -> frozenset[str]:
        """Return A's names in odd rounds, B's in even ones."""
        return frozenset(pair.a if round_number % 2 else pair.b for pair in pairs)
