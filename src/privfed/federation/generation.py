"""What a tuned language model writes on a few test rows, and how close it is to the reference."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from privfed.errors import ConfigError
from privfed.models.examples import device_of
from privfed.models.language import LanguageExamples

NEEDED = ("rouge_score.rouge_scorer", "sacrebleu")
ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Texts that a model wrote.

    Attributes:
        samples: Of each row its ``prompt``, ``reference`` and what was ``generated``.
        metrics: Mean F-measures of ROUGE-1, -2 and -L from 0 to 1 (Lin 2004; package rouge-score, with stemming) and
            corpus BLEU from 0 to 100 (Papineni et al. 2002; package sacrebleu, its default signature).
    """

    samples: tuple[dict[str, str], ...]
    metrics: Mapping[str, float]


def check_generation(rows: int) -> None:
    """Check that what scores generated texts is installed, where any are asked for.

    Raises:
        ConfigError: If it is not.
    """
    if not rows:
        return
    try:
        for name in NEEDED:
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"evaluate.generate = {rows} needs the packages rouge-score and sacrebleu ({error}): "
            "run `pip install 'privfed[generation]'`, or set evaluate.generate = 0."
        ) from error


def generate(model: Any, examples: LanguageExamples, count: int, max_new_tokens: int) -> Generation:
    """Let ``model`` continue the prompts of ``count`` test rows greedily, and score what it writes.

    The rows are spread evenly over the split: the same for every run on the same data.

    Args:
        model: A transformers model, or one that peft wrapped.
        examples: The test split; a plain text is continued from its middle.
        count: Rows; all where there are fewer.
        max_new_tokens: Tokens to write at most.
    """
    rows = np.unique(np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(np.int64))
    tokenizer = examples.tokenizer
    samples = []
    model.eval()
    for row in rows.tolist():
        prompt, reference = examples.continuation(row)
        if len(prompt) and len(reference):
            texts = (prompt, reference, _continued(model, tokenizer, prompt, max_new_tokens))
            decoded = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in texts]
            samples.append(dict(zip(("prompt", "reference", "generated"), decoded, strict=True)))
    return Generation(samples=tuple(samples), metrics=_closeness(samples))


def _continued(model: Any, tokenizer: Any, prompt: Any, max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    from privfed.tuning.adapters import quiet

    longest = getattr(model.config, "max_position_embeddings", None)
    room = max_new_tokens if longest is None else min(max_new_tokens, longest - len(prompt))
    if room < 1:
        return np.empty(0, dtype=np.int64)
    ids = torch.from_numpy(prompt).unsqueeze(0).to(device_of(model))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=room,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.no_grad(), quiet():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return found[0, len(prompt) :].cpu().numpy()


def _closeness(samples: Sequence[Mapping[str, str]]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    if not samples:
        return {}
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    found = [scorer.score(sample["reference"], sample["generated"]) for sample in samples]
    metrics = {name: float(np.mean([scores[name].fmeasure for scores in found])) for name in ROUGE}
    bleu = corpus_bleu([s["generated"] for s in samples], [[s["reference"] for s in samples]])
    return {**metrics, "bleu": float(bleu.score)}
