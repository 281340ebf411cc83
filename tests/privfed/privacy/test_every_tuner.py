"""Every method of peft: exact per-example gradients, or refused with a reason; never silently wrong.

The cases are those of ``benchmarks/per_example_gradients.py``, which runs them on all four kinds of model.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from privfed.errors import ClientError, ModelError
from privfed.privacy.per_example import PerExampleModel, clipped_sum
from privfed.privacy.per_example.coupling import check_independent


def _benchmark() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "per_example_gradients.py"
    spec = importlib.util.spec_from_file_location("per_example_gradients", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BENCH = _benchmark()
ROWS = list(range(len(BENCH.LENGTHS)))
# what the model's own behaviour forbids; everything else has to be exact
REFUSED = {"LILY": "mixes the examples", "POLY": "draws random numbers", "PVERA": "draws random numbers"}
NOT_ON = {
    "bert": {"ADAPTION_PROMPT", "CPT", "XLORA"},
    "llama": {"XLORA"},
}


@pytest.fixture(autouse=True)
def _quiet():
    """peft and torch warn a lot while tuners are built and traced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(kind, name):
    method, make = next((method, make) for case, method, make in BENCH.cases(kind) if case == name)
    return make(), (lambda rows: BENCH.batch_of(kind, method, rows))


def proved(kind, name):
    """Return (engine, batch maker, reference gradients)."""
    module, batch_of = build(kind, name)
    wanted = check_independent(module, BENCH.losses, batch_of, len(ROWS))
    model = PerExampleModel(module)
    model.prove(BENCH.losses, batch_of(ROWS), len(ROWS), wanted)
    return model, batch_of, wanted


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("method", BENCH.methods())
def test_every_method_of_peft_is_exact_or_refused(kind, method):
    if method in NOT_ON[kind]:
        with pytest.raises((ValueError, KeyError, ModelError)):
            proved(kind, method)
        return
    if method in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[method]):
            proved(kind, method)
        return
    model, batch_of, wanted = proved(kind, method)
    found = model.gradients(BENCH.losses, batch_of(ROWS), len(ROWS))
    assert len(found) == sum(p.requires_grad for p in model.module.parameters())
    assert BENCH.worst_error(found, wanted) < 1e-4
    # the fast path says the same, in a batch of another composition
    pair = [2, 0]
    clip = float(clipped_sum([g[pair] for g in wanted], 1.0).norms_B.mean())
    right = clipped_sum([g[pair] for g in wanted], clip)
    fast = model.clipped_sum(BENCH.losses, batch_of(pair), 2, clip)
    torch.testing.assert_close(fast.norms_B, right.norms_B, rtol=1e-3, atol=0)
    assert float((fast.sum_D - right.sum_D).norm() / right.sum_D.norm()) < 1e-3


def test_every_peft_method_of_this_release_is_among_the_cases():
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    assert {str(k.value) for k in PEFT_TYPE_TO_CONFIG_MAPPING} <= set(BENCH.methods())
    assert len(BENCH.methods()) >= 45


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
@pytest.mark.parametrize("name", ["LORA", "IA3", "VERA", "FOURIERFT", "dora", "lora on all linear layers", "full"])
def test_other_models(kind, name):
    model, batch_of, wanted = proved(kind, name)
    assert BENCH.worst_error(model.gradients(BENCH.losses, batch_of(ROWS), len(ROWS)), wanted) < 1e-4


@pytest.mark.parametrize(
    ("kind", "name", "way"),
    [
        ("bert", "LORA", "closed form linear"),
        ("gpt2", "full", "closed form conv1d"),
        ("vit", "full", "closed form conv2d"),
        ("llama", "LN_TUNING", "closed form norm"),
        ("llama", "IA3", "closed form ia3"),
        ("bert", "dora", "closed form dora"),
        ("bert", "VERA", "closed form vera"),
        ("bert", "BOFT", "unit-vmap"),
        ("bert", "LOHA", "unit-loop"),
        ("llama", "P_TUNING", "prompt"),
        ("llama", "ADAPTION_PROMPT", "whole-model vmap"),
        ("llama", "OSF", "loop"),
    ],
)
def test_the_plan_says_which_way_is_used(kind, name, way):
    model, _, _ = proved(kind, name)
    assert set(model.plan()) == set(model.names)
    assert way in model.plan().values()
    assert way in model.describe()


def test_a_plan_that_was_proved_is_what_the_next_engine_starts_from():
    model, batch_of, wanted = proved("llama", "ADAPTION_PROMPT")
    model.close()
    again = PerExampleModel(model.module)
    assert again.describe() == "2 whole-model vmap"
    assert BENCH.worst_error(again.gradients(BENCH.losses, batch_of(ROWS), len(ROWS)), wanted) < 1e-4


@pytest.mark.parametrize("name", ["IA3", "VERA", "dora", "PROMPT_TUNING", "BOFT"])
def test_closing_leaves_the_module_as_it_was(name):
    module, batch_of = build("bert", name)
    before = BENCH.losses(module, batch_of(ROWS)).detach()
    model = PerExampleModel(module)
    model.gradients(BENCH.losses, batch_of(ROWS), len(ROWS))
    torch.testing.assert_close(BENCH.losses(module, batch_of(ROWS)).detach(), before)  # between passes too
    model.close()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert not any("forward" in vars(part) or "get_prompt" in vars(part) for part in module.modules())
    BENCH.losses(module, batch_of(ROWS)).sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["LORA", "IA3", "VERA", "dora", "PROMPT_TUNING", "BOFT"])
def test_the_loss_is_the_model_s_own_while_the_engine_listens(name):
    """A closed form that rewrote a forward pass wrongly would train another model."""
    module, batch_of = build("llama", name)
    plain = BENCH.losses(module, batch_of(ROWS)).detach()
    seen = []

    def loss(m, batch):
        found = BENCH.losses(m, batch)
        seen.append(found.detach())
        return found

    PerExampleModel(module).gradients(loss, batch_of(ROWS), len(ROWS))
    torch.testing.assert_close(seen[-1], plain)


@pytest.mark.parametrize("name", ["LORA", "IA3", "VERA", "dora", "PROMPT_TUNING", "BOFT", "full", "ADAPTION_PROMPT"])
def test_a_pass_that_is_cut_short_leaves_nothing_behind(name):
    model, batch_of, wanted = proved("llama", name)

    class Cut(Exception):  # noqa: N818
        pass

    def cut_in_the_loss(module, batch):
        BENCH.losses(module, batch)
        raise Cut

    def cut_in_the_backward_pass(module, batch):
        found = BENCH.losses(module, batch)
        if found.requires_grad:
            found.register_hook(lambda _: (_ for _ in ()).throw(Cut()))
        return found

    def cut_in_the_middle(module, batch):
        calls = []

        def count(*_):
            calls.append(1)
            if len(calls) == 10:
                raise Cut

        handles = [part.register_forward_hook(count) for part in module.modules()]
        try:
            return BENCH.losses(module, batch)
        finally:
            for handle in handles:
                handle.remove()

    trained = [n for n, p in model.module.named_parameters() if p.requires_grad]
    cuts = [cut_in_the_loss, cut_in_the_middle]
    for cut in cuts if "whole" in model.describe() else [*cuts, cut_in_the_backward_pass]:
        with pytest.raises(Cut):
            model.clipped_sum(cut, batch_of(ROWS), len(ROWS), 1.0)
        assert [n for n, p in model.module.named_parameters() if p.requires_grad] == trained
        found = model.gradients(BENCH.losses, batch_of(ROWS[:3]), 3)
        assert BENCH.worst_error(found, [g[:3] for g in wanted]) < 1e-4


def test_dropout_beside_closed_forms_is_fine_and_within_a_unit_refused():
    """A linear layer's gradient needs no second pass; a unit's would draw another mask."""
    module = BENCH.tuned("bert", "LORA", {"r": 4, "lora_dropout": 0.3})
    batch = BENCH.batch_of("bert", "LORA", ROWS)
    model = PerExampleModel(module)
    torch.manual_seed(0)
    found = model.gradients(BENCH.losses, batch, len(ROWS))
    model.close()
    masks_of_the_trace = 1  # the engine's first pass finds out which modules are called
    torch.manual_seed(0)
    for _ in range(masks_of_the_trace):
        BENCH.losses(module, batch)
    whole = torch.autograd.grad(BENCH.losses(module, batch).sum(), model.parameters)
    for got, want in zip(found, whole, strict=True):
        torch.testing.assert_close(got.sum(0), want, rtol=1e-4, atol=1e-6)
    unit = BENCH.tuned("bert", "FOURIERFT", {"n_frequency": 20})
    next(part for name, part in unit.named_modules() if name.endswith("attention.self.query")).add_module(
        "extra", torch.nn.Dropout(0.2)
    )
    with pytest.raises(ModelError, match=r"dropout \(extra, p = 0\.2\)"):
        PerExampleModel(unit).gradients(BENCH.losses, batch, len(ROWS))


class Sampled(torch.nn.Module):
    """A layer from elsewhere, with a sampler registered for it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale[:, None]


def test_a_sampler_registered_with_opacus_is_used():
    from opacus import GradSampleModule
    from opacus.grad_sample import register_grad_sampler

    asked = []

    @register_grad_sampler(Sampled)
    def sampler(layer, activations, backprops):
        asked.append(1)
        return {layer.scale: (activations[0] * backprops).sum(2)} if layer.scale.requires_grad else {}

    try:
        module = torch.nn.Sequential(Sampled(), torch.nn.GroupNorm(3, 3), torch.nn.Linear(4, 2))
        x = torch.randn(5, 3, 4)
        model = PerExampleModel(module)
        loss = lambda m, batch: m(batch).square().sum((1, 2))  # noqa: E731
        found = model.gradients(loss, x, 5)
        assert asked
        assert model.plan()["0.scale"] == model.plan()["1.weight"] == "opacus sampler"
        model.close()
        for i in range(5):
            alone = torch.autograd.grad(loss(module, x[i : i + 1]).sum(), list(module.parameters()))
            for got, want in zip(found, alone, strict=True):
                torch.testing.assert_close(got[i], want)
    finally:
        GradSampleModule.GRAD_SAMPLERS.pop(Sampled)


def test_a_layer_called_twice_and_a_weight_used_elsewhere_too():
    class Twice(torch.nn.Module):
        def __init__(self, beside: bool) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 6)
            self.beside = beside

        def forward(self, x):
            h = torch.tanh(self.layer(torch.tanh(self.layer(x))))
            return h @ self.layer.weight if self.beside else h

    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))
    loss = lambda m, batch: m(batch).square().sum((1, 2))  # noqa: E731
    for beside in (False, True):
        torch.manual_seed(0)
        module = Twice(beside)
        alone = [torch.autograd.grad(loss(module, x[i : i + 1]).sum(), list(module.parameters())) for i in range(5)]
        wanted = [torch.stack(rows) for rows in zip(*alone, strict=True)]
        model = PerExampleModel(module)
        before = model.gradients(loss, x, 5)
        # a use that no hook sees is only found by comparing: that is what the proof is for
        assert (BENCH.worst_error(before, wanted) < 1e-4) is not beside
        model.prove(loss, x, 5, wanted)
        assert BENCH.worst_error(model.gradients(loss, x, 5), wanted) < 1e-4
        fast = model.clipped_sum(loss, x, 5, 0.5)
        assert float((fast.sum_D - clipped_sum(wanted, 0.5).sum_D).norm()) < 1e-3


def test_a_loss_of_the_wrong_shape_is_refused():
    module, batch_of = build("bert", "LORA")
    with pytest.raises(ClientError, match="no gradient for each example"):
        PerExampleModel(module).gradients(lambda m, b: BENCH.losses(m, b).mean(), batch_of(ROWS), len(ROWS))


@pytest.mark.parametrize("name", ["LORA", "full", "BOFT", "VERA", "dora", "IA3", "PROMPT_TUNING"])
def test_bfloat16_autocast(name):
    model, batch_of, wanted = proved("llama", name)

    def half(module, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return BENCH.losses(module, batch).float()

    found = model.gradients(half, batch_of(ROWS), len(ROWS))
    assert all(g.dtype == torch.float32 for g in found)
    flat = [torch.cat([g.flatten(1) for g in gradients], dim=1) for gradients in (found, wanted)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 3e-2
    clip = 0.5 * float(flat[1].norm(dim=1).min())
    everyone = model.clipped_sum(half, batch_of(ROWS), len(ROWS), clip).sum_D
    assert float(everyone.norm()) <= len(ROWS) * clip


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["LORA", "full", "BOFT", "VERA", "dora"])
def test_gradient_checkpointing_changes_memory_and_not_gradients(name, reentrant):
    model, batch_of, wanted = proved("llama", name)
    module = model.module
    model.close()
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()
    module.train()
    again = PerExampleModel(module)
    again.gradients(BENCH.losses, batch_of(ROWS), len(ROWS))
    calls = []
    handle = base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = again.gradients(BENCH.losses, batch_of(ROWS), len(ROWS))
    handle.remove()
    assert len(calls) == 2  # it is on: the layer runs again in the backward pass
    assert BENCH.worst_error(found, wanted) < 1e-4
