"""Clients to attack: real local training and real codecs on a few texts, seen as an adversary sees them.

What a recorded run gives (``[audit] record``), without the run around it, so that many batches can be tried. Local
training is ``privfed.federation.local.LocalTrainer``; messages go through the codec, and masked ones are added in its
ring, as the server of secure aggregation has their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from privfed.compression import CODECS, Codec, Ring
from privfed.compression.message import sum_of_one
from privfed.compression.state import round_context
from privfed.data.config import DataConfig
from privfed.data.load import load_dataset
from privfed.federation.local import ExampleDp, LocalTrainer
from privfed.models.config import ModelConfig
from privfed.models.examples import TextExamples
from privfed.rng import PrivateStream
from privfed.schedule import ClientConfig
from privfed.tuning import TUNINGS
from privfed.tuning.layout import layout_of, read_flat, write_flat
from privfed.types import Encoded, EncodedSum, Float32, Shard
from privfed_attacks.inversion import Setting
from privfed_attacks.observation import Observation, SideInformation, split
from privfed_attacks.public_model import PublicModel, rebuild
from privfed_attacks.scoring import Batch
from privfed_attacks.sealed import Sealed

CLASSES = ("a", "b", "c")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is attacked.

    Attributes:
        tuning: The tuning's table, with its name.
        compression: The codec's table.
        masked: Whether updates are summed in a ring.
        noise_multiplier: DP-SGD at the clients, or None.
        rounds: Rounds that are observed.
        clients: Clients in each sum.
        batch: Texts of each client, all of them in every step.
        max_tokens: Texts are cut to so many tokens.
        lengths_known: Whether the adversary knows how long each text is, as the literature on matching lets it.
    """

    model: str = "minilm"
    tuning: dict[str, Any] = field(default_factory=lambda: {"name": "lora", "r": 8})
    compression: dict[str, Any] = field(default_factory=lambda: {"name": "identity"})
    masked: bool = False
    noise_multiplier: float | None = None
    l2_clip_norm: float = 1.0
    rounds: int = 1
    clients: int = 1
    batch: int = 4
    max_tokens: int = 20
    lengths_known: bool = False
    learning_rate: float = 0.5
    local_steps: int = 1


class Victims:
    """The clients of a scene, and the server's model between rounds.

    Args:
        scene: What is attacked.
        texts: Where clients' texts are drawn from; sentences of the built-in data set by default.
        seed: Seed of the model's head and adapter, and of the choice of texts.
    """

    def __init__(self, scene: Scene, *, texts: Sequence[str] | None = None, seed: int = 1) -> None:
        self.scene = scene
        self.client = ClientConfig(
            optimizer="sgd",
            learning_rate=scene.learning_rate,
            batch_size=None if scene.noise_multiplier else scene.batch,
            sampling_probability=1.0 if scene.noise_multiplier else None,
            local_steps=scene.local_steps,
        )
        table = TUNINGS.get(scene.tuning["name"]).config.model_validate(scene.tuning)
        self.side = SideInformation(
            model=ModelConfig(name=scene.model, max_length=scene.max_tokens),
            tuning=table,
            init_seed=seed,
            client=self.client,
            label_names=CLASSES,
            clients=scene.clients,
            cohort_size=scene.clients,
            masked=scene.masked,
            compression=CODECS.get(scene.compression["name"]).config.model_validate(scene.compression),
            unit="example" if scene.noise_multiplier else "none",
            noise_multiplier=scene.noise_multiplier,
            l2_clip_norm=scene.l2_clip_norm if scene.noise_multiplier else None,
        )
        self.model: PublicModel = rebuild(self.side)
        self.start_D: Float32 = read_flat(self.model.module)
        self.layout = layout_of(self.model.module)
        self.pool = list(texts) if texts is not None else sentences(self.model.tokenizer, scene.max_tokens)
        plugin = CODECS.get(scene.compression["name"])
        self.ring_bits = 32
        ring = Ring(bits=self.ring_bits, clients=scene.clients) if scene.masked else None
        self.codec: Codec = plugin.build(plugin.config.model_validate(scene.compression), ring)

    def play(self, seed: int) -> tuple[list[Observation], Sealed[Batch], Setting]:
        """Return what is seen of a few rounds over the same texts, the sealed texts, and what the adversary knows."""
        draw = np.random.default_rng(seed)
        scene = self.scene
        count = scene.clients * scene.batch
        rows = draw.choice(len(self.pool), size=min(count + 200, len(self.pool)), replace=False)
        chosen, others = [self.pool[i] for i in rows[:count]], tuple(self.pool[i] for i in rows[count:])
        labels = draw.integers(0, len(CLASSES), count)
        examples = TextExamples(chosen, labels, self.model.tokenizer, scene.max_tokens)
        dp = None
        if scene.noise_multiplier:
            dp = ExampleDp(l2_clip_norm=scene.l2_clip_norm, noise_multiplier=scene.noise_multiplier)
        trainer = LocalTrainer(self.model.module, self.model.tuned.head, examples, self.client, dp)
        params_D, seen = self.start_D, []
        for number in range(1, scene.rounds + 1):
            update_D = self._round(trainer, params_D, number, seed)
            seen.append(self._observed(params_D, update_D, number))
            params_D = (params_D + update_D).astype(np.float32)
        trainer.close()
        write_flat(self.model.module, self.start_D)
        ids = tuple(tuple(int(t) for t in text) for text in examples._ids)  # what the model read, cut as it was
        setting = Setting(
            sequences=count,
            max_tokens=scene.max_tokens,
            lengths=tuple(map(len, ids)) if scene.lengths_known else None,
            auxiliary=others,
            seed=seed,
        )
        return seen, Sealed(Batch(texts=ids, labels=tuple(int(k) for k in labels))), setting

    def _round(self, trainer: LocalTrainer, params_D: Float32, number: int, seed: int) -> Float32:
        scene, messages = self.scene, []
        codec = self.codec
        if codec.properties.needs_context:
            codec = codec.at(round_context(b"benchmark", number, shapes=self.layout.shapes))
        for client in range(scene.clients):
            rows = np.arange(client * scene.batch, (client + 1) * scene.batch)
            stream = PrivateStream(bytes(32), "attacks", seed, number, client)
            shard = Shard(client_id=f"client-{client}", indices=rows)
            delta_D = trainer.run(params_D, shard, stream, lambda _step, _steps: None)
            messages.append(codec.encode(delta_D, PrivateStream(bytes(32), "codec", seed, number, client)))
        if scene.masked:
            total = ring_sum(messages, self.ring_bits)
            return (codec.decode_sum(total) / total.total_weight).astype(np.float32)
        decoded = [codec.decode_sum(sum_of_one(each, codec)) for each in messages]
        return np.mean(decoded, axis=0).astype(np.float32)

    def _observed(self, params_D: Float32, update_D: Float32, number: int) -> Observation:
        single = self.scene.clients == 1
        return Observation(
            vantage="individual" if single else "aggregate",
            phase="train",
            round=number,
            source="client-0" if single else None,
            contributors=self.scene.clients,
            params=split(params_D, self.layout),
            payload=split(update_D, self.layout),
            layout=self.layout,
            side=self.side,
        )


def ring_sum(messages: Sequence[Encoded], bits: int) -> EncodedSum:
    """Return the sum of encodings in a ring, as secure aggregation unmasks it."""
    values = np.sum([each.values_M.astype(np.uint64) for each in messages], axis=0, dtype=np.uint64)
    return EncodedSum(
        sum_M=values & np.uint64((1 << bits) - 1),
        codec=messages[0].codec,
        scale=messages[0].scale,
        length=messages[0].length,
        survivors=len(messages),
        total_weight=float(len(messages)),
    )


def sentences(tokenizer: Any, max_tokens: int, least: int = 6) -> list[str]:
    """Return distinct first sentences of the built-in data set of ``least`` to ``max_tokens`` tokens."""
    dataset = load_dataset(DataConfig(name="pydoc"), seed=0)
    firsts = dict.fromkeys(text.split(". ")[0].strip().rstrip(".") for text in dataset.train.texts)
    found = list(firsts)
    sizes = [len(ids) for ids in tokenizer(found)["input_ids"]]
    return [text for text, size in zip(found, sizes, strict=True) if least <= size <= max_tokens]
