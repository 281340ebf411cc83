"""Attacks on the pictures of a client of a trained vision transformer, beside the mean picture.

    privfed pretrain digits_vit -o digits_vit          # half a minute: 8 x 8 digits 0 to 4
    python benchmarks/attacks_images.py                # digits 5 to 9 at the client, 20 batches each
    python benchmarks/attacks_images.py --show         # print what is there and run nothing

    privfed pretrain small_vit -o small_vit -s data.path=mnist_t10k.safetensors
    python benchmarks/attacks_images.py --model small_vit --data pneumoniamnist_train.safetensors

Clients train as ``privfed`` does (``LocalTrainer``). ``bins``: a malicious server sends adapters that sort tokens,
another direction every round (``adapter_bins``); with DP-SGD at the client beside it. ``pixels``: a curious server
matches the updates of two honest rounds. The prior is the mean of 200 other pictures; PSNR is over the range of the
picture's own values. Finished batches are kept in benchmarks/attacks.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from attacks_store import STORE, mean_text
from shared_work import append_row, read_rows

from privfed.data.config import DataConfig
from privfed.data.load import load_dataset
from privfed.federation.local import ExampleDp, LocalTrainer
from privfed.models.config import ModelConfig
from privfed.models.image_examples import ImageExamples
from privfed.rng import PrivateStream
from privfed.schedule import ClientConfig
from privfed.tuning import TUNINGS
from privfed.tuning.layout import layout_of, read_flat
from privfed.types import Shard
from privfed_attacks.images import form_of
from privfed_attacks.inversion import ATTACKS, Setting
from privfed_attacks.observation import Observation, SideInformation, ThreatModel, split
from privfed_attacks.public_model import rebuild, write_tensors
from privfed_attacks.scoring import Batch, score_images
from privfed_attacks.sealed import Sealed

OTHERS = 200
MALICIOUS = ThreatModel(can_modify=frozenset({"broadcast"}))
ADAPTER = {"name": "adapter", "bottleneck": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is attacked, and by what.

    Attributes:
        attack: Its name in the registry.
        options: Its options.
        tuning: The tuning's table.
        pictures: Of the client, all of them in every step.
        rounds: Rounds that are observed, of one local step each.
        noise_multiplier: DP-SGD at the client, or None.
    """

    attack: str
    options: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=lambda: dict(ADAPTER))
    pictures: int = 1
    rounds: int = 2
    noise_multiplier: float | None = None
    learning_rate: float = 0.1


SCENES = {
    "bins, 1 picture, 8 rounds": Scene(attack="adapter_bins", rounds=8),
    "bins, 4 pictures, 8 rounds": Scene(attack="adapter_bins", rounds=8, pictures=4),
    "bins, 1 picture, 8 rounds, noise multiplier 0.1": Scene(attack="adapter_bins", rounds=8, noise_multiplier=0.1),
    "pixels, full": Scene(attack="pixels", tuning={"name": "full"}),
    "pixels, lora": Scene(attack="pixels", tuning={"name": "lora", "r": 8}),
    "pixels, adapter": Scene(attack="pixels"),
    "pixels, bitfit": Scene(attack="pixels", tuning={"name": "bitfit"}),
}


class Client:
    """A client of a scene, and the pictures that clients draw from.

    Args:
        scene: The scene.
        model: The folder of a vision transformer.
        data: Which pictures.
    """

    def __init__(self, scene: Scene, model: str, data: DataConfig) -> None:
        self.scene = scene
        dp = scene.noise_multiplier is not None
        self.config = ClientConfig(
            optimizer="sgd",
            learning_rate=scene.learning_rate,
            batch_size=None if dp else scene.pictures,
            sampling_probability=1.0 if dp else None,
            local_steps=1,
        )
        self.split: Any = load_dataset(data, seed=0, task="image_classification").train
        names = tuple(str(k) for k in range(1 + max(int(label) for label in self.split.labels)))
        self.side = SideInformation(
            model=ModelConfig(name=model, task="image_classification"),
            tuning=TUNINGS.get(scene.tuning["name"]).config.model_validate(scene.tuning),
            init_seed=1,
            client=self.config,
            label_names=names,
            unit="example" if dp else "none",
            noise_multiplier=scene.noise_multiplier,
            l2_clip_norm=1.0 if dp else None,
        )
        self.model = rebuild(self.side)
        self.start_D = read_flat(self.model.module)
        self.layout = layout_of(self.model.module)

    def play(self, seed: int) -> tuple[list[Observation], Sealed[Batch], Setting]:
        """Return what is seen of a few rounds over the same pictures, the pictures sealed, and what is known."""
        scene, plugin = self.scene, ATTACKS.get(self.scene.attack)
        rows = np.random.default_rng(seed).choice(len(self.split.images), scene.pictures + OTHERS, replace=False)
        own, others = self._examples(rows[: scene.pictures]), self._examples(rows[scene.pictures :])
        beside = others.batch(np.arange(OTHERS)).inputs["pixel_values"].numpy()
        dp = ExampleDp(l2_clip_norm=1.0, noise_multiplier=scene.noise_multiplier) if scene.noise_multiplier else None
        trainer = LocalTrainer(self.model.module, self.model.tuned.head, own, self.config, dp)
        shard, params_D, seen = Shard(client_id="client", indices=np.arange(scene.pictures)), self.start_D, []
        for number in range(1, scene.rounds + 1):
            known = Setting(sequences=scene.pictures, images=beside, seed=number)
            write_tensors(self.model.module, split(params_D, self.layout))
            write_tensors(self.model.module, plugin.broadcast(MALICIOUS, self.model, known, plugin.config()))
            sent_D = read_flat(self.model.module)
            stream = PrivateStream(bytes(32), "attacks", seed, number)
            delta_D = trainer.run(sent_D, shard, stream, lambda _step, _steps: None)
            seen.append(self._observed(sent_D, delta_D, number))
            if plugin.craft is None:
                params_D = (sent_D + delta_D).astype(np.float32)
        trainer.close()
        pictures = own.batch(np.arange(scene.pictures)).inputs["pixel_values"].numpy()
        return seen, Sealed(Batch(images=pictures)), Setting(sequences=scene.pictures, images=beside, seed=seed)

    def _examples(self, rows: Any) -> ImageExamples:
        labels = np.array([int(self.split.labels[row]) for row in rows])
        return ImageExamples([self.split.images[row] for row in rows], labels, form_of(self.model))

    def _observed(self, sent_D: Any, delta_D: Any, number: int) -> Observation:
        return Observation(
            vantage="individual",
            phase="train",
            round=number,
            source="client",
            contributors=1,
            params=split(sent_D, self.layout),
            payload=split(delta_D, self.layout),
            layout=self.layout,
            side=self.side,
        )


def key_of(name: str, model: str, data: DataConfig, seed: int) -> dict[str, Any]:
    """Return what a finished batch is found by."""
    weights = hashlib.sha256((Path(model) / "model.safetensors").read_bytes()).hexdigest()
    pictures = Path(data.path).name if data.path else data.name
    settings = json.dumps([asdict(SCENES[name]), weights, pictures], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    return {"table": "images", "cell": name, "model": Path(model).name, "settings": digest, "batch": seed}


def run(name: str, model: str, data: DataConfig, batches: int) -> None:
    """Run the missing batches of a scene."""
    done = read_rows(STORE)
    missing = [s for s in range(batches) if not _found(done, key_of(name, model, data, s))]
    if not missing:
        return
    client = Client(SCENES[name], model, data)
    for seed in missing:
        seen, truth, setting = client.play(seed)
        row: dict[str, Any] = key_of(name, model, data, seed)
        for attack in (SCENES[name].attack, "prior_images"):
            plugin, started = ATTACKS.get(attack), time.process_time()
            options = plugin.config.model_validate(SCENES[name].options if attack != "prior_images" else {})
            scores = score_images(plugin.run(seen, client.model, setting, options), truth)
            prefix = "prior_" if attack == "prior_images" else ""
            row |= {f"{prefix}{score}": round(value, 4) for score, value in scores.items()}
            row |= {} if prefix else {"cpu_seconds": round(time.process_time() - started, 2)}
        append_row(STORE, row)
        print(json.dumps(row), file=sys.stderr, flush=True)


def table(names: Sequence[str], model: str, data: DataConfig) -> str:
    """Return the finished batches as a table: means with 95 % bootstrap intervals over batches."""
    rows = read_rows(STORE)
    shown = ("psnr", "prior_psnr", "ssim", "prior_ssim")
    lines = ["| scene | batches | PSNR (dB) | of the mean picture | SSIM | of the mean picture |", "|" + "---|" * 6]
    for name in names:
        key = {field: value for field, value in key_of(name, model, data, 0).items() if field != "batch"}
        mine = _found(rows, key)
        if mine:
            parts = [mean_text([row[score] for row in mine]) for score in shown]
            lines.append(f"| {name} | {len(mine)} | {' | '.join(parts)} |")
    return "\n".join(lines)


def _found(rows: Sequence[dict[str, Any]], key: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in rows if all(row.get(name) == value for name, value in key.items())]


def main() -> None:
    """Run the scenes that are asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*SCENES], help="beginnings of names of scenes")
    parser.add_argument("--model", default="digits_vit", help="folder of a vision transformer")
    parser.add_argument("--data", help="safetensors file of pictures; by default digits 5 to 9")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--show", action="store_true", help="print what is there and run nothing")
    given = parser.parse_args()
    if not (Path(given.model) / "model.safetensors").exists():
        raise SystemExit(
            f"There is no model in {given.model}: make it first, privfed pretrain digits_vit -o digits_vit"
        )
    data = DataConfig(path=given.data) if given.data else DataConfig(name="digits", classes=[5, 6, 7, 8, 9])
    names = [name for name in SCENES if name.startswith(tuple(given.only))]
    for name in names:
        if not given.show:
            run(name, given.model, data, given.batches)
    print(table(names, given.model, data))


if __name__ == "__main__":
    main()
