"""Local training: deadlines, batches, and the noise of a private step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from privfed.errors import ClientError, DeadlineError
from privfed.federation.local import ExampleDp, LocalTrainer, deadline
from privfed.models.examples import FeatureExamples
from privfed.rng import PrivateStream
from privfed.schedule import ClientConfig
from privfed.tuning.layout import read_flat
from privfed.types import Shard

WIDTH, CLASSES, ROWS = 40, 50, 64

# deadlines


def _ring_later(_signal: int, _frame: object) -> None:
    raise AssertionError("an alarm of the test's own must not ring here")


@pytest.fixture
def alarm() -> Any:
    """A handler of the caller's, there before and after."""
    before = signal.signal(signal.SIGALRM, _ring_later)
    yield _ring_later
    signal.signal(signal.SIGALRM, before)


def test_a_deadline_in_time_leaves_no_trace(alarm: object) -> None:
    with deadline(5):
        assert signal.getsignal(signal.SIGALRM) is not alarm
    assert signal.getsignal(signal.SIGALRM) is alarm
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_deadline_cuts_a_sleep_short_and_restores_the_handler(alarm: object) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"deadline of 0\.2 s \(client\.deadline_s\)"), deadline(0.2):
        time.sleep(10)
    assert 0.15 < time.monotonic() - started < 3
    assert signal.getsignal(signal.SIGALRM) is alarm
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_deadline_cuts_a_loop_short() -> None:
    with pytest.raises(DeadlineError), deadline(0.2):
        while True:
            pass


def test_an_error_in_the_body_restores_the_handler(alarm: object) -> None:
    with pytest.raises(ZeroDivisionError), deadline(5):
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGALRM) is alarm
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_another_thread_the_time_is_looked_at_afterwards() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            with deadline(0.05):
                time.sleep(0.15)
        except DeadlineError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(caught) == 1


# training


class Rows(FeatureExamples):
    """Features that remember which rows were asked for."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        features = torch.from_numpy(rng.standard_normal((ROWS, WIDTH)).astype(np.float32))
        super().__init__(features, torch.from_numpy(rng.integers(0, CLASSES, ROWS)))
        self.asked: list[list[int]] = []

    def batch(self, rows: Any) -> Any:
        self.asked.append(rows.tolist())
        return super().batch(rows)


def _trainer(dp: ExampleDp | None = None, **changes: Any) -> LocalTrainer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Linear(WIDTH, CLASSES)
    values = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 8, "local_steps": 1, **changes}
    return LocalTrainer(module, "", Rows(), ClientConfig.model_validate(values), dp)


def _run(trainer: LocalTrainer, shard: Shard, name: str = "a") -> np.ndarray:
    steps: list[tuple[int, int]] = []
    start = read_flat(trainer.module)
    delta = trainer.run(start, shard, PrivateStream(bytes(32), name), lambda step, of: steps.append((step, of)))
    count = trainer.config.local_steps
    assert steps == [(step, count) for step in range(1, count + 1)]
    from privfed.tuning.layout import write_flat

    write_flat(trainer.module, start)
    return delta


SHARD = Shard(client_id="c", indices=np.arange(10, 34))


def test_plain_batches_cover_the_shard_before_any_row_comes_again() -> None:
    trainer = _trainer(local_steps=6)
    _run(trainer, SHARD)
    asked = trainer.examples.asked
    assert [len(rows) for rows in asked] == [8] * 6
    for epoch in (asked[:3], asked[3:]):
        assert sorted(chain.from_iterable(epoch)) == SHARD.indices.tolist()
    assert asked[:3] != asked[3:]


def test_a_batch_larger_than_the_shard_is_the_shard() -> None:
    trainer = _trainer(batch_size=500, local_steps=2)
    _run(trainer, SHARD)
    assert [sorted(rows) for rows in trainer.examples.asked] == [SHARD.indices.tolist()] * 2


def test_plain_steps_equal_torchs_on_the_whole_shard() -> None:
    trainer = _trainer(batch_size=len(SHARD), local_steps=3, momentum=0.9)
    delta = _run(trainer, SHARD)
    module = nn.Linear(WIDTH, CLASSES)
    module.load_state_dict(trainer.module.state_dict())
    start = read_flat(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    examples = Rows()
    for _ in range(3):
        optimizer.zero_grad()
        batch = examples.batch(SHARD.indices)
        nn.functional.cross_entropy(module(batch.inputs), batch.labels_B).backward()
        optimizer.step()
    np.testing.assert_allclose(delta, read_flat(module) - start, atol=1e-5)


@pytest.mark.parametrize("private", [True, False])
def test_the_size_of_a_microbatch_changes_nothing(private: bool) -> None:
    dp = ExampleDp(l2_clip_norm=0.5, noise_multiplier=1.0) if private else None
    small = _run(_trainer(dp, batch_size=20, local_steps=2, physical_batch_size=3), SHARD)
    large = _run(_trainer(dp, batch_size=20, local_steps=2, physical_batch_size=64), SHARD)
    np.testing.assert_allclose(small, large, atol=1e-6)


def test_private_batches_are_poisson_samples_of_the_shard() -> None:
    dp = ExampleDp(l2_clip_norm=0.5, noise_multiplier=1.0)
    trainer = _trainer(dp, local_steps=200, batch_size=6, physical_batch_size=64)
    _run(trainer, SHARD)
    asked = trainer.examples.asked  # empty batches never get here
    assert all(len(set(rows)) == len(rows) and set(rows) <= set(SHARD.indices.tolist()) for rows in asked)
    counts = np.bincount(list(chain.from_iterable(asked)), minlength=ROWS)[SHARD.indices]
    assert np.abs(counts - 50).max() < 5 * np.sqrt(200 * 0.25 * 0.75)
    sizes = np.array([len(rows) for rows in asked])
    assert 0.6 < sizes.var() / (24 * 0.25 * 0.75) < 1.6


def _within(values: np.ndarray, standard_deviation: float) -> bool:
    return bool(abs(values.std() / standard_deviation - 1) < 5 / np.sqrt(2 * values.size))


def test_an_empty_batch_is_a_step_of_pure_noise_of_the_accounted_size() -> None:
    dp = ExampleDp(l2_clip_norm=0.5, noise_multiplier=1.3)
    trainer = _trainer(dp, batch_size=None, sampling_probability=1e-9)
    delta = _run(trainer, SHARD).astype(np.float64)
    assert trainer.examples.asked == []
    right = 0.1 * 1.3 * 0.5 / (1e-9 * len(SHARD))  # learning rate times noise over the *expected* batch
    assert _within(delta, right)
    assert not _within(delta, right * 2 / 3)
    assert not _within(delta, right * 3 / 2)


def test_private_noise_is_the_accounted_one_on_top_of_a_clipped_sum() -> None:
    clip, noise = 0.01, 2.0
    noisy = _run(_trainer(ExampleDp(l2_clip_norm=clip, noise_multiplier=noise)), SHARD).astype(np.float64)
    quiet = _run(_trainer(ExampleDp(l2_clip_norm=clip, noise_multiplier=1e-9)), SHARD).astype(np.float64)
    right = 0.1 * noise * clip / 8
    assert _within(noisy - quiet, right)
    assert not _within(noisy - quiet, right * 2 / 3)
    assert not _within(noisy - quiet, right * 3 / 2)


def test_one_example_moves_a_private_step_by_at_most_the_clip() -> None:
    clip = 0.01
    config = {"batch_size": None, "sampling_probability": 1.0, "learning_rate": 1.0}
    whole, fewer = (
        _run(_trainer(ExampleDp(l2_clip_norm=clip, noise_multiplier=1e-9), **config), shard).astype(np.float64) * size
        for shard, size in ((SHARD, 24), (replace(SHARD, indices=SHARD.indices[1:]), 23))
    )
    distance = float(np.linalg.norm(whole - fewer))
    assert 0.9 * clip < distance <= clip * (1 + 1e-4)


@pytest.mark.parametrize("dp", [None, ExampleDp(l2_clip_norm=0.5, noise_multiplier=1.0)])
def test_not_a_number_is_the_clients_failure(dp: ExampleDp | None) -> None:
    trainer = _trainer(dp)
    trainer.examples.features_NF[SHARD.indices] = float("nan")
    with pytest.raises(ClientError, match="finite"):
        _run(trainer, SHARD)


def test_the_head_has_its_own_learning_rate() -> None:
    module = nn.Sequential()
    module.add_module("body", nn.Linear(WIDTH, 7))
    module.add_module("head", nn.Linear(7, CLASSES))
    config = ClientConfig(optimizer="sgd", learning_rate=1e-12, head_learning_rate=1.0, batch_size=8, local_steps=1)
    trainer = LocalTrainer(module, "head", Rows(), config, None)
    delta = _run(trainer, SHARD)
    body = WIDTH * 7 + 7
    assert np.abs(delta[:body]).max() < 1e-9 < 1e-3 < np.abs(delta[body:]).max()


def test_a_trainer_takes_its_hooks_off(federation: Callable[..., Any]) -> None:
    run = federation()
    run.round()
    module = run.stage.module
    assert any(m._forward_hooks for m in module.modules())
    run.stage.trainer.close()
    assert not any(m._forward_hooks for m in module.modules())
    run.round()  # and puts them on again


# what is added to the gradient


def test_fedprox_equals_the_gradient_of_its_own_objective() -> None:
    mu, rate, steps = 0.7, 0.1, 3
    trainer = _trainer(batch_size=len(SHARD), local_steps=steps, proximal_mu=mu)
    delta = _run(trainer, SHARD)
    module = nn.Linear(WIDTH, CLASSES)
    module.load_state_dict(trainer.module.state_dict())
    start = read_flat(module)
    anchors = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    examples = Rows()
    for _ in range(steps):
        optimizer.zero_grad()
        batch = examples.batch(SHARD.indices)
        near = sum(((p - a) ** 2).sum() for p, a in zip(module.parameters(), anchors, strict=True))
        (nn.functional.cross_entropy(module(batch.inputs), batch.labels_B) + mu / 2 * near).backward()
        optimizer.step()
    np.testing.assert_allclose(delta, read_flat(module) - start, atol=1e-5)
    assert np.abs(delta - _run(_trainer(batch_size=len(SHARD), local_steps=steps), SHARD)).max() > 1e-3


@pytest.mark.parametrize("addition", ["proximal", "correction"])
def test_what_is_added_comes_after_clipping_and_noise(addition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the clipped sums nor the noise change: with everything else fixed the difference is the addition."""
    from privfed.federation import local
    from privfed.federation.local import Work

    sums: list[np.ndarray] = []
    plain = local.__dict__["privatise_sum"]

    def privatise(sum_D: np.ndarray, **options: Any) -> Any:
        sums.append(sum_D.copy())
        return plain(sum_D, **options)

    monkeypatch.setattr(local, "privatise_sum", privatise)
    clip, rate = 0.01, 0.1
    dp = ExampleDp(l2_clip_norm=clip, noise_multiplier=1.0)
    config = {"batch_size": 8, "local_steps": 1}
    base = _run(_trainer(dp, **config), SHARD)
    start = read_flat(_trainer().module)
    if addition == "proximal":
        config |= {"local_steps": 2, "proximal_mu": 5.0}
        changed = _run(_trainer(dp, **config), SHARD)
        free = _run(_trainer(dp, **config | {"proximal_mu": 0.0}), SHARD)
        # the first step starts at the anchor: 0; the second adds mu times the first step's noised move
        np.testing.assert_allclose(changed - free, -rate * 5.0 * base, atol=1e-6)
    else:
        push = np.full(start.size, 3.0, dtype=np.float32)
        trainer = _trainer(dp, **config)
        stream = PrivateStream(bytes(32), "a")
        changed = trainer.run(start, SHARD, stream, lambda step, of: None, Work(correction_D=push))
        np.testing.assert_allclose(changed - base, -rate * push, atol=1e-6)
    for total_D in sums:
        assert np.linalg.norm(total_D) <= clip * len(SHARD)
    firsts = sums[0], sums[1]
    np.testing.assert_array_equal(*firsts)


def test_a_model_without_a_head_has_one_learning_rate() -> None:
    module = nn.Linear(WIDTH, CLASSES)
    config = ClientConfig(optimizer="sgd", learning_rate=0.1, head_learning_rate=9.0, batch_size=8, local_steps=1)
    trainer = LocalTrainer(module, None, Rows(), config, None)
    start = read_flat(module)
    found = _run(trainer, SHARD)
    module.load_state_dict(trainer.module.state_dict())
    same = ClientConfig(optimizer="sgd", learning_rate=0.1, batch_size=8, local_steps=1)
    np.testing.assert_array_equal(read_flat(module), start)
    np.testing.assert_array_equal(found, _run(LocalTrainer(module, None, Rows(), same, None), SHARD))


def test_resting_tensors_are_left_alone_and_come_back() -> None:
    from privfed.federation.local import Work

    dp = ExampleDp(l2_clip_norm=0.5, noise_multiplier=1.0)
    trainer = _trainer(dp)
    start = read_flat(trainer.module)
    for active, moved in (({"weight"}, slice(0, WIDTH * CLASSES)), ({"bias"}, slice(WIDTH * CLASSES, None))):
        stream = PrivateStream(bytes(32), "a")
        work = Work(active=frozenset(active))
        delta = trainer.run(start, SHARD, stream, lambda step, of: None, work)
        rest = np.ones(delta.size, dtype=bool)
        rest[moved] = False
        assert (delta[moved] != 0).mean() > 0.99
        assert not delta[rest].any()
        assert all(p.requires_grad for p in trainer.module.parameters())
    assert (_run(trainer, SHARD) != 0).mean() > 0.99  # hooks for all of them again
    trainer.close()
