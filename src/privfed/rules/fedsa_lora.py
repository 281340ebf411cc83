"""FedSA-LoRA: A is shared, B stays with its client.

Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR, arXiv 2410.01463: A
learns what is general and B what is the client's own. Half as many values are sent; each client ends with a model of
its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from privfed.rules import LORA_TUNINGS, RULES, Pair, Rule


@RULES.register("fedsa_lora")
class FedSaLora(Rule):
    """Keeps every B personal."""

    takes = LORA_TUNINGS
    ranks = True

    def personal(self, pairs: Sequence[Pair]) -> frozenset[str]:
        """Return B's names."""
        return frozenset(pair.b for pair in pairs)
