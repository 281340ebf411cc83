"""The baseline of every inversion: guesses from texts of the same kind, without any update.

What an attack finds that this finds too was no secret of the clients: function words, mostly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from privfed.table import Table
from privfed_attacks.inversion import ATTACKS, Attack, Reconstruction, Setting

if TYPE_CHECKING:
    from privfed_attacks.observation import Observation
    from privfed_attacks.public_model import PublicModel


class PriorConfig(Table):
    """No options: what it guesses follows from the auxiliary texts."""

    name: Literal["prior"] = "prior"


def run(
    observations: Sequence[Observation],  # noqa: ARG001  (that is the point)
    model: PublicModel,
    setting: Setting,
    config: PriorConfig,  # noqa: ARG001
) -> Reconstruction:
    """Return the most frequent tokens of the auxiliary texts, as many as so many texts have, and some of the texts.

    Without auxiliary texts: the first words of the vocabulary, which tokenizers list by frequency.
    """
    tokenizer = model.tokenizer
    special = set(tokenizer.all_special_ids)
    draw = np.random.default_rng(setting.seed)
    count = setting.sequences or 1
    if not setting.auxiliary:
        words = [token for token in range(len(tokenizer)) if token not in special]
        plain = [token for token in words if str(tokenizer.convert_ids_to_tokens(token)).strip("Ġ▁").isalpha()]
        return Reconstruction(tokens=frozenset((plain or words)[: count * setting.max_tokens // 2]))
    texts = [
        tuple(tokenizer(text, truncation=True, max_length=setting.max_tokens)["input_ids"])
        for text in setting.auxiliary
    ]
    chosen = [texts[int(i)] for i in draw.choice(len(texts), size=min(count, len(texts)), replace=False)]
    often = Counter(token for text in texts for token in text if token not in special)
    distinct = len({token for text in chosen for token in text} - special)
    return Reconstruction(
        tokens=frozenset(token for token, _ in often.most_common(distinct)),
        sequences=tuple(chosen),
        facts={"auxiliary": len(texts)},
    )


ATTACKS.register("prior")(Attack(config=PriorConfig, run=run))
