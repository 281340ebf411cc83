"""Attacks on a recorded run, scored against the data that its holder has.

The auditor stands in for two: the adversary, who is handed observations only, and the data holder, who seals what each
client had. What an attack says is compared with *all* texts of the clients it saw. Where a client trains on batches,
recall is therefore at most the share of its texts that were drawn; precision is what it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from privfed.errors import ConfigError
from privfed.federation.material import Material, gather
from privfed.federation.phases import TRAIN
from privfed.federation.shared import NOTHING, SharedWork
from privfed.federation.transcript import Transcript
from privfed.files import write_atomic
from privfed.types import View
from privfed_attacks.inversion import ATTACKS, Reconstruction, Setting
from privfed_attacks.observation import Observation, ThreatModel
from privfed_attacks.public_model import PublicModel, rebuild
from privfed_attacks.scoring import Batch, score_texts
from privfed_attacks.sealed import Sealed, unseal

PRIOR = "prior"
_AUXILIARY = 200


def reconstruct(
    folder: Path,
    attacks: Sequence[str],
    *,
    view: View | None = None,
    clients: int = 1,
    keep: bool = False,
    shared: SharedWork = NOTHING,
) -> dict[str, Any]:
    """Attack a recorded run and write ``audit/reconstruction.json`` into its folder.

    Args:
        folder: The run folder.
        attacks: Names of inversion attacks on texts; the prior-only baseline is always beside them.
        view: What the adversary sees; by default all that the run let a server see.
        clients: Of how many clients single updates are attacked, in an individual view.
        keep: Return the texts too, each with what was found of it (``texts``); they are not written.
        shared: What else has computed the run's data already.

    Raises:
        ConfigError: If an attack is not known or not for texts, or the run is not one of a text classifier.
        TranscriptError: If the run was not recorded.
    """
    plugins = {name: ATTACKS.get(name) for name in dict.fromkeys([*attacks, PRIOR])}
    for name, plugin in plugins.items():
        if plugin.reads != "texts":
            raise ConfigError(f"The attack {name!r} looks for {plugin.reads}: this audit takes attacks on texts.")
    transcript = Transcript(folder)
    if transcript.config.model.task != "sequence_classification":
        raise ConfigError(f"This audit is for text classifiers, and the run's task is {transcript.config.model.task}.")
    chosen: View = view or ("aggregate" if transcript.masked else "individual")
    threat = ThreatModel(role="client" if chosen == "release" else "server", observes=chosen)
    seen = [each for each in threat.view(transcript) if each.phase == TRAIN]
    if not seen:
        raise ConfigError("The recorded run has no round that gave this adversary anything to see.")
    material, model = gather(transcript.config, shared), rebuild(seen[0].side)
    rows: list[dict[str, Any]] = []
    kept: list[list[dict[str, Any]]] = []
    for source, observations in _targets(seen, clients):
        names = {source} if source is not None else {name for r in transcript.rounds(TRAIN) for name in r.survivors}
        truth, setting = _truth(material, model, names, transcript.config.model.max_length)
        for name, plugin in plugins.items():
            guess = plugin.run(observations, model, setting, plugin.config())
            scores = {key: round(value, 4) for key, value in score_texts(guess, truth, model.tokenizer).items()}
            rows.append(
                {"attack": name, "client": source, "rounds": len(observations), **scores, "facts": {**guess.facts}}
            )
            kept.append(paired(guess, truth, model.tokenizer) if keep else [])
    found = {"view": chosen, "transcript": transcript.digests(), "results": rows}
    (folder / "audit").mkdir(exist_ok=True)
    write_atomic(folder / "audit" / "reconstruction.json", (json.dumps(found, indent=1) + "\n").encode())
    if keep:
        return {**found, "results": [{**row, "texts": texts} for row, texts in zip(rows, kept, strict=True)]}
    return found


def paired(guess: Reconstruction, truth: Sealed[Batch], tokenizer: Any) -> list[dict[str, Any]]:
    """Return each text with what was found of it, and the share of its tokens that is in that.

    Guessed texts are matched to the texts that they share most tokens with, one each. Where the tokens that an attack
    found say more of a text than any text that it put together, the text is shown with a dot for every token that it
    missed, and ``ordered`` is false: of the order it knows nothing.
    """
    special = set(tokenizer.all_special_ids)
    texts = [[token for token in text if token not in special] for text in unseal(truth).texts]
    guesses = [[token for token in text if token not in special] for text in guess.sequences]
    if not guesses:
        return [_bag(text, guess.tokens, tokenizer) for text in texts]
    said = [Counter(each) for each in guesses]
    shared = np.array([[_share(bag, each) for each in said] for bag in map(Counter, texts)])
    rows, columns = linear_sum_assignment(-shared)
    match = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    ordered = [
        {
            "truth": tokenizer.decode(text),
            "found": tokenizer.decode(guesses[match[i]]) if i in match else "",
            "score": round(float(shared[i, match[i]]), 4) if i in match else 0.0,
            "ordered": True,
        }
        for i, text in enumerate(texts)
    ]
    bags = [_bag(text, guess.tokens, tokenizer) for text in texts]
    return [max(pair, key=lambda each: each["score"]) for pair in zip(ordered, bags, strict=True)]


def _bag(text: list[int], tokens: frozenset[int], tokenizer: Any) -> dict[str, Any]:
    words = [tokenizer.decode([token]) if token in tokens else "\u00b7" for token in text]
    score = sum(token in tokens for token in text) / max(1, len(text))
    return {"truth": tokenizer.decode(text), "found": " ".join(words), "score": round(score, 4), "ordered": False}


def _share(text: Counter[int], guess: Counter[int]) -> float:
    """Return the share of a text's tokens, counted as often as they occur, that a guess has."""
    return (text & guess).total() / max(1, text.total())


def _targets(seen: Sequence[Observation], clients: int) -> list[tuple[str | None, list[Observation]]]:
    """Return who is attacked with which observations: some clients, or everybody together."""
    sources = list(dict.fromkeys(each.source for each in seen))[:clients]
    return [(source, [each for each in seen if each.source == source]) for source in sources]


def _truth(material: Material, model: PublicModel, clients: set[str], longest: int) -> tuple[Sealed[Batch], Setting]:
    """Return what the clients have, sealed, and what an adversary may know of it."""
    train: Any = material.dataset.train
    test: Any = material.dataset.test
    rows = [int(row) for shard in material.shards if shard.client_id in clients for row in shard.indices]
    texts = model.tokenizer([train.texts[row] for row in rows], truncation=True, max_length=longest)["input_ids"]
    auxiliary = tuple(test.texts[:_AUXILIARY])
    size = max(len(text) for text in model.tokenizer(list(auxiliary), truncation=True, max_length=longest)["input_ids"])
    truth = Batch(texts=tuple(tuple(text) for text in texts))
    return Sealed(truth), Setting(sequences=len(rows), max_tokens=size, auxiliary=auxiliary)
