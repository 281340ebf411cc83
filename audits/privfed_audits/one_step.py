"""One step of DP-SGD as it is shipped, attacked by the best test there is, against the closed form.

The released step is the true sum of clipped gradients plus noise. An adversary that knows everything but one example's
bit has the likelihood ratio of N(0, (z C)^2) and N(C, (z C)^2) along that example's gradient: AUC = Phi(1 / (z sqrt 2))
for a noise multiplier z and an example whose gradient is clipped (norm C). More than that means too little noise or a
sum that one example moves too far; less, that noise is wasted or the attack is not the best.

The trainer's own code runs: Poisson sampling, clipping, noise, scaling and the optimiser's step. The truth is had by
repeating the private stream's draws. Shape suffixes: N scores, Q examples, D trained values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed.federation.local import LocalTrainer
from privfed.models.examples import losses
from privfed.privacy.per_example import PerExampleModel
from privfed.rng import PrivateStream
from privfed.tuning.layout import layout_of, trained, write_flat
from privfed.types import Float32, Shard
from privfed_attacks.membership.gradient_dot import gradient_dot

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrials:
    """Attributes:
    scores_N: Gradient-dot with everything else known, one a step and example; in units of the clip.
    members_N: Whether the example was in that step's batch.
    steps_N: The step that each score is of.
    """

    scores_N: Floats = field(repr=False)
    members_N: NDArray[np.bool_] = field(repr=False)
    steps_N: NDArray[np.int64] = field(repr=False)


def one_step_trials(trainer: LocalTrainer, params_D: Float32, shard: Shard, *, key: bytes, steps: int) -> StepTrials:
    """Return the scores of ``steps`` independent steps from the same parameters.

    Args:
        trainer: With DP, ``optimizer = "sgd"``, one local step and a sampling probability below 1.
        params_D: Where each step starts.
        shard: Every one of its examples is asked for in every step.
        key: Secret of the private streams of this experiment.
        steps: How many.

    Raises:
        ConfigError: If the trainer takes other steps, or an example's gradient is below the clip: the closed form is
            for examples that use all of it.
    """
    config, dp = trainer.config, trainer.dp
    probability = config.probability(len(shard))
    if dp is None or config.optimizer != "sgd" or config.momentum or config.local_steps != 1 or probability >= 1:
        raise ConfigError(
            'This check reads one plain step: give a trainer with DP, client.optimizer = "sgd" without momentum, '
            "client.local_steps = 1 and a sampling probability below 1."
        )
    clipped_QD = clipped_gradients(trainer, params_D, shard)
    scale = trainer.rates(layout_of(trainer.module)) / config.expected_batch(len(shard))
    scores, members = [], []
    for step in range(steps):
        bits_Q = PrivateStream(key, "one-step", step).bernoulli(probability, len(shard))  # the trainer's first draw
        delta_D = trainer.run(params_D, shard, PrivateStream(key, "one-step", step), lambda *_: None)
        released_D = delta_D.astype(np.float64) / scale  # minus the noised sum
        # what the adversary knows of each query's step is everything but that query
        rest_QD = clipped_QD[bits_Q].sum(axis=0) - bits_Q[:, None] * clipped_QD
        for row in range(len(shard)):
            known = -rest_QD[None, row]
            scores.append(gradient_dot(released_D[None], clipped_QD[None, row : row + 1], known)[0] / dp.l2_clip_norm)
        members.append(bits_Q)
    return StepTrials(
        scores_N=np.array(scores),
        members_N=np.concatenate(members),
        steps_N=np.repeat(np.arange(steps), len(shard)),
    )


def clipped_gradients(trainer: LocalTrainer, params_D: Float32, shard: Shard) -> Floats:
    """Return the shard's per-example gradients at ``params_D``, clipped, in the layout's order [Q, D].

    Raises:
        ConfigError: If one is shorter than the clip.
    """
    if trainer.dp is None:
        raise ConfigError("This trainer has no clip.")
    clip = trainer.dp.l2_clip_norm
    trainer.close()
    write_flat(trainer.module, params_D)
    trainer.module.train()
    model = PerExampleModel(trainer.module)
    try:
        batch = trainer.examples.batch(shard.indices)
        rows = model.gradients(lambda module, b: losses(trainer.examples, module, b), batch, len(shard))
    finally:
        model.close()
    by_tensor = {id(p): g.reshape(len(shard), -1) for p, g in zip(model.parameters, rows, strict=True)}
    ordered = [by_tensor[id(p)].double().numpy() for _, p in trained(trainer.module)]
    gradients_QD = np.concatenate(ordered, axis=1)
    norms_Q = np.linalg.norm(gradients_QD, axis=1)
    if norms_Q.min() < clip:
        raise ConfigError(
            f"An example's gradient has norm {norms_Q.min():.3g}, below the clip of {clip:g}: lower "
            "privacy.l2_clip_norm, so that every example uses all of it."
        )
    return np.asarray(gradients_QD * (clip / norms_Q)[:, None], dtype=np.float64)
