"""The span attack (DAGER), over several rounds and through sums.

Petrov, Dimitrov, Baader, Müller, Vechev 2024, "DAGER: Exact Gradient Inversion for Large Language Models", NeurIPS,
arXiv 2405.15586. The input of the first layer is a look-up, frozen and public: so are all possible inputs. Those of
the batch span the rows of the first layer's gradient, and as long as there are fewer of them than the layer is wide, a
token (at a position) is in the batch if and only if its input lies in that span. Candidate texts are then checked in
the span of the second layer, where a position's input depends on the whole text (encoders) or on all before it
(decoders).

What is added here:

* **Stacking.** Query, key and value of a block get the same input, so their gradients share one span: a LoRA of rank r
  on three of them shows 3r directions of it a step.
* **Accumulation over rounds.** Adapters are trained over *frozen* embeddings, so the inputs of the same texts are the
  same in every round, and so is their span. In a *sum over clients* the rows lie in the span of all their inputs
  together: secure aggregation does not hide them. Where the layers below are trained, the inputs move, and only rounds
  with the same parameters there are stacked.
* **Inputs are looked for together** (``privfed_attacks.text.pursuit``): the few entries of the known dictionary that
  explain all rows, which takes far fewer directions than there are inputs. A rank-r update that shows but r directions
  hides nothing; what counts is how many distinct inputs there are against the width d.
* **What is noise is known** (``privfed_attacks.text.spans``): rounding, the codec, DP noise.
* LoRA's B (FFA-LoRA): its rows lie in the span of A x, r wide, so it says something only for fewer than r inputs.

Limits: dropout in the embeddings, Adam (its step is no linear function of the gradient), more distinct inputs in a sum
than about half of the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from privfed.table import Table
from privfed_attacks.inversion import ATTACKS, Attack, Reconstruction, Setting

if TYPE_CHECKING:
    from privfed_attacks.observation import Observation
    from privfed_attacks.public_model import PublicModel


class SpanConfig(Table):
    """Options.

    Attributes:
        share: A token is taken if it is nearer to the span than this share of what is usual in the vocabulary.
        evidence: ... and stays if what it explains is so many times what noise would.
        order: Put the tokens into texts with the second layer.
        restarts: How often the search for a text starts anew.
    """

    name: Literal["span"] = "span"
    share: float = Field(default=0.9, gt=0, le=1)
    evidence: float = Field(default=4.0, gt=0)
    order: bool = True
    restarts: int = Field(default=4, ge=1)


def run(
    observations: Sequence[Observation], model: PublicModel, setting: Setting, config: SpanConfig
) -> Reconstruction:
    """Return the tokens whose inputs lie in the observed span, and the texts that the second layer confirms."""
    from privfed_attacks.text.membership import members
    from privfed_attacks.text.ordering import ordered
    from privfed_attacks.text.pursuit import Limits

    limits = Limits(share=config.share, evidence=config.evidence)
    found = members(observations, model, setting.max_tokens, limits)
    facts: dict[str, Any] = dict(found.facts)
    texts: tuple[tuple[int, ...], ...] = ()
    if config.order and found.pairs:
        texts = ordered(observations, model, setting, found, restarts=config.restarts)
    special = set(model.tokenizer.all_special_ids)
    tokens = frozenset(token for token, _ in found.pairs) - special
    return Reconstruction(tokens=tokens, sequences=texts, facts=facts)


ATTACKS.register("span")(Attack(config=SpanConfig, run=run))
