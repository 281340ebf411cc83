"""Pretrain a small vision transformer from scratch, plainly, on public images.

Two things are learned at once from the class token: the class of an image together with the quarter turn it was
given (Gidaris, Singh and Komodakis 2018, "Unsupervised representation learning by predicting image rotations",
arXiv 1803.07728), and the image itself through a linear decoder, so that the token tells apart what the pretraining
classes do not. Head and decoder are thrown away; the backbone is saved.

Shape suffixes: B images of a batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, pad

from privfed.errors import DataError
from privfed.models.image_examples import ImageFormat, image_format, to_pixel_values
from privfed.models.loading import quiet_transformers
from privfed.models.recipes import Pixels, Pretrained, PublicImages, Say
from privfed.rng import experiment_rng, experiment_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from privfed.models.recipes.small_vit import SmallVitConfig

TURNS = 4
SMOOTHING = 0.1
WEIGHT_DECAY = 0.05
# transformers' 0.02 is meant for widths of 768: a narrow model starts with next to no signal and learns late
INITIAL = 0.1
_PIECE = 256


def pretrain_vit(data: PublicImages, config: SmallVitConfig, say: Say) -> Pretrained:
    """Train a ViT on ``data`` and return it without its head.

    Args:
        data: Public images.
        config: The model and its training; with one number of threads, equal arguments give equal weights.
        say: Told how it goes, a few times.

    Raises:
        DataError: If there are fewer images than a batch.
        ModelError: If the images' channels cannot be turned into the model's.
    """
    if len(data.images) < config.batch_size:
        raise DataError(
            f"{len(data.images)} images are fewer than batch_size = {config.batch_size}: give more, or lower it."
        )
    preprocessor = _preprocessor(config)
    form = image_format(_vit_config(config), preprocessor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment_seed(config.seed, "pretrain") % (1 << 31))
        learner = _Learner(config, data.classes)
        _fit(learner, data, form, config, say)
    accuracy = _accuracy(learner, data.test_images, data.test_labels, form)
    say(f"Accuracy on {len(data.test_images)} held-out images of the pretraining classes: {accuracy:.3f}")
    facts = {
        "images": len(data.images),
        "classes": data.classes,
        "held_out_images": len(data.test_images),
        "held_out_accuracy": round(accuracy, 4),
    }

    def save(folder: Path) -> None:
        with quiet_transformers():
            learner.backbone.eval().save_pretrained(str(folder))

    return Pretrained(save=save, preprocessor=preprocessor, facts=facts)


class _Learner(nn.Module):
    """The backbone, with a head for classes and quarter turns and a decoder to pixels."""

    def __init__(self, config: SmallVitConfig, classes: int) -> None:
        from transformers import ViTModel

        super().__init__()
        self.backbone: Any = ViTModel(_vit_config(config), add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, classes * TURNS)
        self.decoder = nn.Linear(config.hidden_size, config.num_channels * config.image_size**2)

    def token(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the class token of each image [B, hidden]."""
        states: torch.Tensor = self.backbone(pixel_values=pixels_BCHW).last_hidden_state
        return states[:, 0]


def _vit_config(config: SmallVitConfig) -> Any:
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=2 * config.hidden_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=INITIAL,
    )


def _preprocessor(config: SmallVitConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 2,  # bilinear, by Pillow's number
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * config.num_channels,
        "image_std": [0.5] * config.num_channels,
    }


def _fit(learner: _Learner, data: PublicImages, form: ImageFormat, config: SmallVitConfig, say: Say) -> None:
    rng = experiment_rng(config.seed, "pretrain", "batches")
    labels_N = torch.from_numpy(np.array(data.labels, dtype=np.int64))
    steps = len(data.images) // config.batch_size
    optimizer = torch.optim.AdamW(learner.parameters(), lr=config.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps * config.epochs)
    learner.train()
    for epoch in range(1, config.epochs + 1):
        order = rng.permutation(len(data.images))
        for step in range(steps):
            rows = order[step * config.batch_size : (step + 1) * config.batch_size]
            pixels_BCHW = to_pixel_values([data.images[row] for row in rows], form)
            pixels_BCHW, turns_B = _augmented(pixels_BCHW, config.shift, rng)
            loss = _loss(learner, pixels_BCHW, labels_N[rows] * TURNS + turns_B, config.reconstruction)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if epoch == config.epochs or epoch % max(1, config.epochs // 4) == 0:
            say(f"Epoch {epoch} of {config.epochs}: loss {float(loss.detach()):.3f}")


def _loss(learner: _Learner, pixels_BCHW: torch.Tensor, classes_B: torch.Tensor, weight: float) -> torch.Tensor:
    token_BF = learner.token(pixels_BCHW)
    loss = cross_entropy(learner.head(token_BF), classes_B, label_smoothing=SMOOTHING)
    return loss + weight * mse_loss(learner.decoder(token_BF), pixels_BCHW.flatten(1)) if weight else loss


def _augmented(pixels_BCHW: torch.Tensor, shift: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images moved by up to ``shift`` pixels and turned, and the quarter turns [B]; edges are repeated."""
    size, _, height, width = pixels_BCHW.shape
    wide = pad(pixels_BCHW, (shift,) * 4, mode="replicate") if shift else pixels_BCHW
    moves = rng.integers(0, 2 * shift + 1, (size, 2))
    turns = rng.integers(0, TURNS, size)
    images = [
        torch.rot90(image[:, y : y + height, x : x + width], int(turn), (1, 2))
        for image, (y, x), turn in zip(wide, moves.tolist(), turns, strict=True)
    ]
    return torch.stack(images), torch.from_numpy(turns)


def _accuracy(learner: _Learner, images: Sequence[Pixels], labels: np.ndarray, form: ImageFormat) -> float:
    """Return the share of upright images whose class is found."""
    learner.eval()
    hits = 0
    with torch.no_grad():
        for start in range(0, len(images), _PIECE):
            pixels_BCHW = to_pixel_values(images[start : start + _PIECE], form)
            scores = learner.head(learner.token(pixels_BCHW))
            upright = scores.view(len(scores), -1, TURNS)[:, :, 0].argmax(dim=1).numpy()
            hits += int((upright == labels[start : start + _PIECE]).sum())
    return hits / max(1, len(images))
