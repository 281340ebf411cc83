"""Causal language models: what is learned, that each loss is the example's own, and where truncation cuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from privfed.errors import DataError, ModelError
from privfed.models import ModelConfig
from privfed.models.language import LanguageExamples, TokenSequence, last_stretch
from privfed.models.loading import load_model
from privfed.models.sequences import from_conversations, from_responses, from_texts

FAMILIES = ("gpt2", "llama")
CHATML = (
    "{% for m in messages %}balan {{ m.role }} bamor {{ m.content }} banet {% endfor %}"
    "{% if add_generation_prompt %}balan assistant bamor {% endif %}"
)
THOUGHTLESS = (  # writes only the last answer in full
    "{% for m in messages %}balan {% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %} banet "
    "{% endfor %}"
    "{% if add_generation_prompt %}balan {% endif %}"
)
PROMPTS = ["cat dog", "rain snow wind storm cloud fog", "piano"]
RESPONSES = ["horse cow sheep goat", "sun", "violin drum flute song melody rhythm chord choir"]


def load(folder, **options):
    return load_model(ModelConfig(name=str(folder), task="causal_lm", **options), label_names=(), seed=1)


@pytest.fixture(params=FAMILIES)
def loaded(request, tiny_model):
    return load(tiny_model(request.param))


@pytest.fixture
def tokenizer(tiny_gpt2):
    return load(tiny_gpt2).tokenizer


def words(tokenizer, sequence):
    """Return the tokens, those that are learned in brackets."""
    tokens = tokenizer.convert_ids_to_tokens(sequence.ids.tolist())
    return " ".join(f"[{token}]" if wanted else token for token, wanted in zip(tokens, sequence.learned, strict=True))


def test_the_head_is_the_models_own_and_nothing_is_cached(loaded):
    assert loaded.task == "causal_lm" and loaded.num_labels == 0 and loaded.processor is None
    assert loaded.model.get_output_embeddings() is not None
    assert loaded.model.config.use_cache is False


def test_each_loss_is_the_mean_over_the_examples_own_learned_tokens(loaded):
    """Against transformers' own loss, one example at a time; its batched loss is another (reference failure)."""
    model = loaded.model.eval()
    examples = LanguageExamples(from_responses(PROMPTS, RESPONSES, loaded.tokenizer, 32), loaded.tokenizer)
    found = examples.losses(model, examples.batch(np.arange(3)))
    wanted = []
    for sequence in from_responses(PROMPTS, RESPONSES, loaded.tokenizer, 32):
        ids = torch.from_numpy(sequence.ids).unsqueeze(0)
        labels = torch.where(torch.from_numpy(sequence.learned).unsqueeze(0), ids, -100)
        wanted.append(model(input_ids=ids, labels=labels).loss)
    assert torch.allclose(found, torch.stack(wanted), rtol=1e-5)
    batch = examples.batch(np.arange(3))
    everyone = cross_entropy(examples.logits(model, batch).flatten(0, 1), batch.targets_BT.flatten(), ignore_index=-100)
    assert (
        abs(float((everyone - found.mean()).detach())) > 1e-3
    )  # the mean over the batch's tokens would weigh examples by length


def test_no_loss_and_no_gradient_depends_on_the_neighbours(loaded):
    examples = LanguageExamples(from_responses(PROMPTS, RESPONSES, loaded.tokenizer, 32), loaded.tokenizer)
    model = loaded.model.eval()
    weight = next(p for n, p in model.named_parameters() if "layers.0" in n or "h.0" in n)
    batched = examples.losses(model, examples.batch(np.arange(3)))
    for row in range(3):
        alone = examples.losses(model, examples.batch(np.array([row])))[0]
        assert torch.allclose(batched[row], alone, rtol=1e-5)
        (one,) = torch.autograd.grad(alone, weight)
        (within,) = torch.autograd.grad(batched[row], weight, retain_graph=True)
        assert torch.allclose(one, within, atol=1e-6)


def test_logits_are_computed_for_the_learned_tokens_only(loaded):
    examples = LanguageExamples(from_responses(PROMPTS, RESPONSES, loaded.tokenizer, 32), loaded.tokenizer)
    batch = examples.batch(np.arange(3))
    head = loaded.model.get_output_embeddings()
    seen = []
    handle = head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:2]))
    logits = examples.logits(loaded.model.eval(), batch)
    handle.remove()
    assert seen == [(3, 9)] and logits.shape[:2] == (3, 9)  # 8 words and the end token, not all 11 positions
    assert batch.inputs["input_ids"].shape[1] == 11
    whole = loaded.model(**batch.inputs).logits
    for row in range(3):
        for place, position in enumerate(batch.positions_BT[row]):
            assert torch.allclose(logits[row, place], whole[row, position], atol=1e-5)
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("side", ["text", "response"])
def test_an_example_without_learned_tokens_has_loss_and_gradient_zero(loaded, side):
    bare = TokenSequence(np.array([7]), np.zeros(1, dtype=bool))
    prompt = TokenSequence(np.array([5, 6, 7]), np.zeros(3, dtype=bool))
    ordinary = from_texts(["cat dog horse"], loaded.tokenizer, 16)[0]
    examples = LanguageExamples([bare if side == "text" else prompt, ordinary], loaded.tokenizer)
    losses = examples.losses(loaded.model, examples.batch(np.arange(2)))
    assert float(losses[0].detach()) == 0 and float(losses[1].detach()) > 0
    grads = torch.autograd.grad(losses[0], list(loaded.model.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_what_is_learned_of_texts_and_responses(tokenizer):
    (text,) = from_texts(["cat dog"], tokenizer, 16)
    assert words(tokenizer, text) == "<end> [cat] [dog] [<end>]"
    (pair,) = from_responses(["cat dog"], ["rain snow"], tokenizer, 16)
    assert words(tokenizer, pair) == "<end> cat dog [rain] [snow] [<end>]"
    (empty,) = from_texts([""], tokenizer, 16)
    assert words(tokenizer, empty) == "<end> [<end>]"


def test_a_tokenizer_without_start_and_end_learns_all_but_the_first_token(tokenizer):
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.pad_token = "<a>"
    (text,) = from_texts(["cat dog horse"], tokenizer, 16)
    assert words(tokenizer, text) == "cat [dog] [horse]"
    (pair,) = from_responses(["rain snow wind"], ["cat dog horse"], tokenizer, 3)
    assert words(tokenizer, pair) == "wind [cat] [dog]"
    (empty,) = from_texts([""], tokenizer, 16)
    assert words(tokenizer, empty) == "<a>"


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (7, "<end> rain snow wind [cat] [dog] [<end>]"),
        (6, "<end> snow wind [cat] [dog] [<end>]"),
        (4, "<end> [cat] [dog] [<end>]"),
        (3, "<end> [cat] [dog]"),
    ],
)
def test_truncation_keeps_the_response_and_the_end_of_the_prompt(tokenizer, longest, expected):
    (pair,) = from_responses(["rain snow wind"], ["cat dog"], tokenizer, longest)
    assert words(tokenizer, pair) == expected
    (text,) = from_texts(["cat dog horse cow sheep goat"], tokenizer, 4)
    assert words(tokenizer, text) == "<end> [cat] [dog] [horse]"  # and no end token: the text goes on


TALK = [
    ("system", "sun"), ("user", "cat dog"), ("assistant", "rain"), ("user", "fox"), ("assistant", "snow wind"),
]  # fmt: skip


def test_all_that_the_assistant_says_is_learned(tokenizer):
    tokenizer.chat_template = CHATML
    (talk,) = from_conversations([TALK], tokenizer, 64)
    learned = tokenizer.convert_ids_to_tokens(talk.ids[talk.learned].tolist())
    assert learned == ["rain", "banet", "snow", "wind", "banet"]
    whole = tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in TALK], tokenize=False, add_generation_prompt=False
    )
    assert talk.ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_of_a_template_that_drops_earlier_answers_the_last_is_learned(tokenizer):
    tokenizer.chat_template = THOUGHTLESS
    (talk,) = from_conversations([TALK], tokenizer, 64)
    assert tokenizer.convert_ids_to_tokens(talk.ids[talk.learned].tolist()) == ["snow", "wind", "banet"]


def test_truncation_of_a_conversation_keeps_its_last_answer(tokenizer):
    tokenizer.chat_template = CHATML
    (talk,) = from_conversations([TALK], tokenizer, 5)
    assert words(tokenizer, talk).endswith("[snow] [wind] [banet]") and len(talk.ids) == 5


def test_templates_that_cannot_serve(tokenizer):
    with pytest.raises(ModelError, match="needs a tokenizer with a chat template, and this model's has none"):
        from_conversations([TALK], tokenizer, 64)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses conversation 1 of its split \(roles must alternate\)"):
        from_conversations([TALK], tokenizer, 64)
    tokenizer.chat_template = "{% for m in messages|reverse %}{{ m.content }} {% endfor %}"
    with pytest.raises(ModelError, match="does not write a turn after the ones before it"):
        from_conversations([TALK], tokenizer, 64)


def test_the_last_stretch():
    assert last_stretch(np.array([0, 1, 1, 0, 1, 0], dtype=bool)) == (4, 5)
    assert last_stretch(np.array([1, 1], dtype=bool)) == (0, 2)
    assert last_stretch(np.zeros(3, dtype=bool)) == (3, 3)


def test_what_a_model_is_asked_to_continue(tokenizer):
    pairs = LanguageExamples(from_responses(["cat dog"], ["rain snow"], tokenizer, 16), tokenizer)
    assert [tokenizer.decode(ids) for ids in pairs.continuation(0)] == ["<end> cat dog", "rain snow <end>"]
    plain = LanguageExamples(from_texts(["cat dog horse cow sheep"], tokenizer, 16), tokenizer)
    prompt, reference = (tokenizer.decode(ids) for ids in plain.continuation(0))
    assert f"{prompt} {reference}" == "<end> cat dog horse cow sheep <end>" and prompt == "<end> cat dog horse"


@pytest.mark.parametrize("kind", ["lora", "ffa_lora"])
def test_per_example_gradients_of_adapters_equal_one_at_a_time(loaded, kind):
    from privfed.federation.sentinels import check_gradients
    from privfed.tuning import TUNINGS

    plugin = TUNINGS.get(kind)
    targets = ["c_attn"] if loaded.model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    tuned = plugin.apply(loaded, plugin.config(r=2, target_modules=targets), 5)
    assert tuned.head is None
    assert not any("lm_head" in name for name, p in tuned.model.named_parameters() if p.requires_grad)
    examples = LanguageExamples(from_responses(PROMPTS, RESPONSES, loaded.tokenizer, 32), loaded.tokenizer)
    for probe in (examples, examples.probe(1)):
        sentence, _ = check_gradients(tuned.model, probe, private=True)
        assert "per-example gradients equal autograd's" in sentence
