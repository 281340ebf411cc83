"""The attacks on clients of a tiny model: what they find, and that they find nothing where nothing is to be found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from privfed.errors import ConfigError
from privfed_attacks.inversion import ATTACKS, Reconstruction, Setting
from privfed_attacks.observation import Observation, SideInformation, split
from privfed_attacks.public_model import PublicModel, rebuild
from privfed_attacks.scoring import Batch, score_images, score_labels, score_texts
from privfed_attacks.sealed import Sealed

TEXTS = (
    "balan dopil cat piano",
    "kumor rain benet dusto goat",
    "bipil song wolf kenet",
    "dilan storm kapil horse drum",
)
OTHERS = ("cow sheep fox mouse", "violin flute chord choir", "snow wind cloud frost bolan", "bonet bemor binet")
LABELS = (0, 2, 1, 0)
Play = Callable[..., tuple[list[Observation], PublicModel, Sealed[Batch], Setting]]


@pytest.fixture(scope="module")
def play(tiny_model: Callable[[str], Path]) -> Play:
    """Return ``play(tuning, rounds=, clients=, noise=)``: updates of clients of a tiny model that train by SGD."""
    from privfed.models.config import ModelConfig
    from privfed.schedule import ClientConfig
    from privfed.tuning import TUNINGS
    from privfed.tuning.layout import layout_of, read_flat, trained, write_flat

    made: dict[tuple[str, str], tuple[SideInformation, PublicModel]] = {}

    def public(family: str, tuning: dict[str, Any], steps: int) -> tuple[SideInformation, PublicModel]:
        table = TUNINGS.get(tuning["name"]).config.model_validate(tuning)
        client = ClientConfig(optimizer="sgd", learning_rate=0.5, batch_size=4, local_steps=steps)
        side = SideInformation(
            model=ModelConfig(name=str(tiny_model(family)), max_length=16),
            tuning=table,
            init_seed=5,
            client=client,
            label_names=("a", "b", "c"),
        )
        key = (family, repr(table))
        if key not in made:
            model = rebuild(side)
            draw = torch.Generator().manual_seed(3)
            with torch.no_grad():  # attention of a model with small random weights is all but blind to its input
                for name, parameter in model.module.named_parameters():
                    if (
                        any(part in name for part in (".lora_B.", ".query.", ".key.", ".value."))
                        and parameter.dim() > 1
                    ):
                        parameter.normal_(0, 0.3, generator=draw)
            made[key] = side, model
        return side, made[key][1]

    def update(model: PublicModel, params_D: Any, texts: Sequence[str], labels: Sequence[int], steps: int) -> Any:
        module = model.module
        write_flat(module, params_D)
        batch = model.tokenizer(list(texts), padding=True, return_tensors="pt")
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        for _ in range(steps):
            parameters = [parameter for _, parameter in trained(module)]
            loss = torch.nn.functional.cross_entropy(module(**given).logits, torch.tensor(list(labels)))
            found = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, found, strict=True):
                    parameter -= 0.5 * gradient
        return read_flat(module) - params_D

    def run(
        tuning: dict[str, Any],
        *,
        family: str = "bert",
        rounds: int = 1,
        clients: int = 1,
        noise: float = 0.0,
        steps: int = 1,
        count: int = 4,
    ) -> tuple[list[Observation], PublicModel, Sealed[Batch], Setting]:
        side, model = public(family, tuning, steps)
        layout, start_D = layout_of(model.module), read_flat(model.module)
        params_D, seen, draw = start_D, [], np.random.default_rng(0)
        texts, labels, each = TEXTS[:count], LABELS[:count], count // clients
        for number in range(1, rounds + 1):
            parts = [slice(i * each, (i + 1) * each) for i in range(clients)]
            deltas = [update(model, params_D, texts[part], labels[part], steps) for part in parts]
            mean_D = np.mean(deltas, axis=0) + noise * draw.standard_normal(len(params_D))
            seen.append(
                Observation(
                    vantage="individual" if clients == 1 else "aggregate",
                    phase="train",
                    round=number,
                    source="client" if clients == 1 else None,
                    contributors=clients,
                    params=split(params_D, layout),
                    payload=split(mean_D.astype(np.float32), layout),
                    layout=layout,
                    side=side,
                )
            )
            params_D = (params_D + mean_D).astype(np.float32)
        write_flat(model.module, start_D)
        ids = tuple(tuple(model.tokenizer(text)["input_ids"]) for text in texts)
        setting = Setting(sequences=count, max_tokens=8, lengths=tuple(map(len, ids)), auxiliary=OTHERS, labels=labels)
        return seen, model, Sealed(Batch(texts=ids, labels=labels)), setting

    return run


def attacked(name: str, played: Any, **options: Any) -> tuple[Reconstruction, dict[str, float]]:
    """Return what an attack finds and its scores."""
    seen, model, truth, setting = played
    plugin = ATTACKS.get(name)
    guess = plugin.run(seen, model, setting, plugin.config.model_validate(options))
    return guess, score_texts(guess, truth, model.tokenizer)


def test_span_finds_every_token_and_text_of_one_full_step(play: Play) -> None:
    guess, scores = attacked("span", play({"name": "full"}, count=2), order=False)
    assert scores["token_precision"] == 1.0
    assert scores["token_recall"] >= 0.85  # in a model this small a direction can drown in the rounding
    assert guess.facts["rank"] < guess.facts["width"]
    played = play({"name": "full"}, count=2)
    _, scores = attacked("span", played)
    assert scores["rougeL"] > attacked("prior", played)[1]["rougeL"]


LORA = {"name": "lora", "r": 4, "target_modules": ["query", "value"]}


def test_one_update_shows_more_tokens_than_it_has_directions(play: Play) -> None:
    played = play(LORA, count=2)
    guess, scores = attacked("span", played, order=False)
    assert int(guess.facts["rank"]) <= 8 < int(guess.facts["members"])
    assert scores["token_recall"] >= 0.9
    assert scores["token_precision"] >= 0.9


def test_rounds_accumulate(play: Play) -> None:
    narrow = {**LORA, "r": 1}
    _, once = attacked("span", play(narrow, count=4), order=False)
    guess, often = attacked("span", play(narrow, rounds=8, count=4), order=False)
    assert int(guess.facts["rank"]) > 4
    assert once["token_recall"] < often["token_recall"]


def test_a_sum_over_clients_hides_nothing_from_accumulation(play: Play) -> None:
    _, scores = attacked("span", play(LORA, rounds=4, clients=2, count=4), order=False)
    assert scores["token_recall"] >= 0.8
    assert scores["token_precision"] >= 0.8


def drawn(play: Play, number: int, count: int, rows: int, noise: float) -> tuple[Any, Any, set[tuple[int, int]]]:
    """Return (rows, dictionary, truth): random combinations of ``count`` random entries of a model's dictionary."""
    from privfed_attacks.text.inputs import groups
    from privfed_attacks.text.pursuit import dictionary_of

    seen, model, _, _ = play(LORA, count=2)
    module = model.at(seen[0])
    words = np.arange(len(model.tokenizer), dtype=np.int64)
    group = next(g for g in groups(module, seen[0].layout.names, len(words)) if g.depth == 0)
    entries = dictionary_of(module, group.first, words, 8)
    draw = np.random.default_rng(number)
    truth = {(int(draw.integers(5, len(words))), place) for place in draw.permutation(8)[:count].tolist()}
    x = entries.vectors(sorted(truth))
    return 1e4 * draw.standard_normal((rows, len(x))) @ x + noise * draw.standard_normal((rows, 32)), entries, truth


def test_few_directions_of_noiseless_rows_are_explained_by_the_entries_behind_them(play: Play) -> None:
    from privfed_attacks.text.pursuit import explain

    right = [set(explain(rows, entries).pairs) == truth for rows, entries, truth in
             (drawn(play, number, count=6, rows=4, noise=1.0) for number in range(10))]  # fmt: skip
    assert sum(right) >= 9


def test_rows_of_noise_are_explained_by_nothing(play: Play) -> None:
    from privfed_attacks.text.pursuit import explain

    for number in range(5):
        _, entries, _ = drawn(play, number, count=6, rows=4, noise=1.0)
        noise = np.random.default_rng(number).standard_normal((16, 32))
        assert explain(noise, entries).pairs == ()


def test_a_word_that_only_corrects_positions_is_not_needed(play: Play) -> None:
    """Right words at wrong places, and a word of which only what it says of places is used: it alone is dropped."""
    from privfed_attacks.text.pursuit import Limits, _Search

    for number in range(5):
        rows, entries, truth = drawn(play, number, count=4, rows=8, noise=1.0)
        words = [word for word, _ in sorted(truth)]
        extra = next(word for word in range(5, 100) if word not in words)
        search = _Search(rows, entries, Limits())
        wrong = [(word, (place + 1) % 8) for word, place in sorted(truth)]
        search._add([*wrong, (extra, 0), (extra, 5)])
        assert search._needed_words() == set(words)
        without = _Search(rows, entries, Limits())
        without._add([*wrong[1:], (extra, 0), (extra, 5)])
        assert without._needed_words() >= set(words[1:])  # with a word missing none of the right ones goes


def test_noise_leaves_the_span_attack_nothing(play: Play) -> None:
    played = play({"name": "full"}, noise=0.05)
    _, scores = attacked("span", played, order=False)
    _, prior = attacked("prior", played)
    assert scores["token_recall"] * scores["token_precision"] <= prior["token_recall"] + 0.05


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_span_grows_texts_of_decoders(play: Play, family: str) -> None:
    _, scores = attacked("span", play({"name": "full"}, family=family, count=2))
    assert scores["token_recall"] == 1.0
    assert scores["exact"] == 1.0


def test_the_subspace_attack_finds_a_text_where_there_is_no_noise(play: Play) -> None:
    _, scores = attacked("subspace", play({"name": "full"}, count=1), steps=40)
    assert scores["token_recall"] == 1.0
    assert scores["token_precision"] == 1.0
    assert scores["exact"] == 1.0


def test_nothing_is_near_a_span_of_which_nothing_was_sent() -> None:
    from privfed_attacks.text.subspace import SoftSpan

    assert SoftSpan([]).distance(torch.randn(2, 3, 8)).tolist() == [[1.0] * 3] * 2  # a coarse codec rounds it all away


def test_the_subspace_attack_bends_under_quantisation_and_does_not_break(play: Play) -> None:
    seen, model, truth, setting = play({"name": "full"}, count=1)
    largest = max(float(np.abs(value).max()) for name, value in seen[0].payload.items() if "layer.0.attention" in name)
    step = np.float32(largest / 64)
    coarse = [replace(seen[0], payload={n: np.round(v / step) * step for n, v in seen[0].payload.items()})]
    _, scores = attacked("subspace", (coarse, model, truth, setting), steps=40)
    _, prior = attacked("prior", (coarse, model, truth, setting))
    assert scores["token_recall"] > prior["token_recall"] + 0.4
    _, together = attacked("span", (coarse, model, truth, setting), order=False)
    assert together["token_recall"] > prior["token_recall"] + 0.4
    assert together["token_precision"] == 1.0
    empty = [replace(seen[0], payload={n: np.zeros_like(v) for n, v in seen[0].payload.items()})]
    guess, _ = attacked("subspace", (empty, model, truth, setting))
    assert guess == Reconstruction(facts={"signal": 0.0})


def test_the_subspace_attack_says_what_it_needs(play: Play) -> None:
    seen, model, _, setting = play({"name": "full"})
    plugin = ATTACKS.get("subspace")
    with pytest.raises(ConfigError, match="number of examples"):
        plugin.run(seen, model, replace(setting, sequences=None), plugin.config())
    seen, model, _, setting = play({"name": "bitfit"})
    with pytest.raises(ConfigError, match="use the attack matching"):
        plugin.run(seen, model, setting, plugin.config())


def test_full_batches_of_other_data_are_not_confirmed(play: Play) -> None:
    """A control: the updates of one batch say nothing about the tokens of another."""
    seen, model, _, setting = play({"name": "full"})
    other = Sealed(
        Batch(texts=tuple(tuple(model.tokenizer(t)["input_ids"]) for t in ("dipor fog sheep", "bulan hail")))
    )
    guess = ATTACKS.get("span").run(seen, model, setting, ATTACKS.get("span").config.model_validate({"order": False}))
    assert score_texts(guess, other, model.tokenizer)["token_recall"] == 0.0


def test_matching_finds_what_the_prior_does_not(play: Play) -> None:
    played = play({"name": "lora", "r": 4, "target_modules": ["query", "value"]}, count=1)
    _, scores = attacked("matching", played, steps=60, polish=32)
    _, prior = attacked("prior", played)
    assert scores["bag_recall"] >= 0.5 > prior["bag_recall"]


@pytest.mark.parametrize("objective", ["l2", "tag", "cosine"])
@pytest.mark.parametrize("tuning", ["bitfit", "lora"])
def test_every_objective_is_least_at_the_truth(play: Play, objective: str, tuning: str) -> None:
    from privfed_attacks.sealed import unseal
    from privfed_attacks.text.matching import Matcher

    seen, model, truth, setting = play({"name": tuning}, count=2)
    matcher = Matcher(seen, model, setting, ATTACKS.get("matching").config.model_validate({"objective": objective}))
    texts = [list(text) for text in unseal(truth).texts]
    padded = [text + [model.tokenizer.pad_token_id] * (max(map(len, texts)) - len(text)) for text in texts]
    right = matcher._discrete_loss(torch.tensor(padded))
    other = [row[:] for row in padded]
    other[0][1] = padded[1][1]
    assert right < 0.01
    assert matcher._discrete_loss(torch.tensor(other)) > 2 * right


def test_matching_simulates_local_steps(play: Play) -> None:
    from privfed_attacks.text.simulate import Simulation, twice_differentiable

    seen, model, _, _ = play({"name": "lora", "r": 4, "target_modules": ["query", "value"]}, steps=3, count=2)
    module = model.at(seen[0])
    batch = model.tokenizer(list(TEXTS[:2]), padding=True, return_tensors="pt")
    embeddings = module.get_input_embeddings()(batch["input_ids"]).detach()
    with twice_differentiable():
        made = Simulation(module, seen[0]).update(embeddings, batch["attention_mask"], torch.tensor(LABELS[:2]))
    for name, value in made.items():
        np.testing.assert_allclose(value.detach().numpy(), seen[0].payload[name], rtol=1e-2, atol=1e-6)


def test_matching_says_what_it_needs(play: Play) -> None:
    seen, model, _, setting = play({"name": "bitfit"}, count=1)
    run, options = ATTACKS.get("matching").run, ATTACKS.get("matching").config()
    with pytest.raises(ConfigError, match="number of examples"):
        run(seen, model, replace(setting, sequences=None), options)
    blind = [replace(each, side=replace(each.side, client=None)) for each in seen]
    with pytest.raises(ConfigError, match="local training"):
        run(blind, model, setting, options)


@pytest.mark.parametrize("count", [1, 4])
def test_labels_are_in_the_bias(play: Play, count: int) -> None:
    seen, model, truth, setting = play({"name": "full"}, count=count)
    plugin = ATTACKS.get("labels")
    guess = plugin.run(seen, model, replace(setting, labels=None), plugin.config())
    assert guess.labels == Counter(LABELS[:count])
    assert score_labels(guess, truth) == {"label_recall": 1.0, "labels_exact": 1.0}


def test_the_prior_reads_no_update(play: Play) -> None:
    seen, model, _, setting = play({"name": "full"})
    plugin = ATTACKS.get("prior")
    guess = plugin.run(seen, model, setting, plugin.config())
    assert guess == plugin.run([], model, setting, plugin.config())
    words = {token for text in OTHERS for token in model.tokenizer(text)["input_ids"]}
    assert guess.tokens <= words


def test_every_attack_has_a_table_with_its_name_and_a_paper() -> None:
    import sys

    wanted = {"span", "matching", "subspace", "labels", "prior", "pixels", "adapter_bins", "prior_images"}
    assert wanted <= set(ATTACKS.names())
    for name, plugin in ATTACKS.items():
        assert getattr(plugin.config(), "name", None) == name
        module = sys.modules[plugin.run.__module__]
        assert module.__doc__
        assert module.__name__ == f"privfed_attacks.inversion.{name}"  # one file an attack, named like it
        assert name.startswith("prior") or "arXiv" in module.__doc__


NEW = '''"""Longest words: an attack of a test, in a file of its own. No paper."""

from typing import Literal

from privfed.table import Table
from privfed_attacks.inversion import ATTACKS, Attack, Reconstruction


class LongestConfig(Table):
    """No options."""

    name: Literal["longest"] = "longest"


def run(observations, model, setting, config):
    """Return the longest words of the vocabulary."""
    words = sorted(model.tokenizer.get_vocab().items(), key=lambda each: -len(each[0]))
    return Reconstruction(tokens=frozenset(token for _, token in words[: setting.max_tokens]))


ATTACKS.register("longest")(Attack(config=LongestConfig, run=run))
'''


def test_a_new_attack_is_one_file(tmp_path: Path) -> None:
    """In a process of its own: a file put into the folder is found, configured and run without another line."""
    import subprocess
    import sys

    import privfed_attacks.inversion as inversion

    (tmp_path / "longest.py").write_text(NEW)
    code = (
        "import privfed_attacks.inversion as i;"
        f"i.__path__.append({str(tmp_path)!r});"
        "a = i.ATTACKS.get('longest'); assert 'longest' in i.ATTACKS.names();"
        "print(a.config().name, a.reads, a.server)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["longest", "texts", "curious"]
    assert inversion.__doc__ is not None


@pytest.mark.parametrize("pairs", [10_000, 0], ids=["every pair", "by shared tokens"])
def test_texts_are_scored_against_the_truth(play: Play, monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr("privfed_attacks.scoring._MOST_PAIRS", pairs)
    _, model, truth, _ = play({"name": "full"})
    tokenizer = model.tokenizer
    ids = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    special = set(tokenizer.all_special_ids)
    right = Reconstruction(sequences=tuple(reversed(ids)))
    best = score_texts(right, truth, tokenizer)
    assert {best[key] for key in ("token_recall", "token_precision", "bag_recall", "rouge1", "rougeL", "exact")} == {
        1.0
    }
    half = score_texts(Reconstruction(sequences=tuple(ids[:2])), truth, tokenizer)
    assert half["exact"] == 0.5
    assert half["token_precision"] == 1.0 > half["token_recall"]
    backwards = Reconstruction(sequences=tuple((i[0], *i[-2:0:-1], i[-1]) for i in ids))
    turned = score_texts(backwards, truth, tokenizer)
    assert turned["rouge1"] == 1.0 > turned["rougeL"]
    assert turned["exact"] == 0.0
    bag = score_texts(Reconstruction(tokens=frozenset(ids[0]) - special), truth, tokenizer)
    assert bag["rouge1"] == 0.0 < bag["token_recall"] < 1
    nothing = score_texts(Reconstruction(), truth, tokenizer)
    assert set(nothing.values()) == {0.0}


def test_images_are_scored_against_the_truth() -> None:
    draw = np.random.default_rng(0)
    images = draw.random((3, 1, 16, 16)).astype(np.float32)
    truth = Sealed(Batch(images=images))
    same = score_images(Reconstruction(images=images[::-1].copy()), truth)
    assert same["psnr"] == 100.0
    assert same["ssim"] == pytest.approx(1.0)
    noisy = images + 0.1 * draw.standard_normal(images.shape).astype(np.float32)
    close = score_images(Reconstruction(images=noisy), truth)
    assert close["psnr"] == pytest.approx(20.0, abs=0.5)
    far = score_images(Reconstruction(images=draw.random(images.shape).astype(np.float32)), truth)
    assert far["ssim"] < 0.2 < close["ssim"] < 1
    assert score_images(Reconstruction(), truth)["ssim"] < 0.2


@pytest.mark.parametrize(
    ("codec", "share"),
    [({"name": "stochastic_quantizer", "bits": 8, "max_value": 0.25}, 0.1), ({"name": "sign", "magnitude": 0.01}, 0.3)],
)
def test_the_noise_of_a_codec_is_what_it_does_to_an_update(play: Play, codec: dict[str, Any], share: float) -> None:
    """Within a factor of two of the real difference, or above ``share`` of it for values of another distribution."""
    from privfed.compression import CODECS
    from privfed.compression.message import sum_of_one
    from privfed.rng import PrivateStream
    from privfed_attacks.codec_noise import codec_noise

    seen, _, _, _ = play({"name": "full"}, count=2)
    plugin = CODECS.get(codec["name"])
    table = plugin.config.model_validate(codec)
    built, real_D = plugin.build(table, None), seen[0].flat()
    came_D = built.decode_sum(sum_of_one(built.encode(real_D, PrivateStream(bytes(32), "test")), built))
    side = replace(seen[0].side, compression=table)
    coarse = replace(seen[0], side=side, payload=split(came_D.astype(np.float32), seen[0].layout))
    names = [name for name in seen[0].layout.names if "attention.self" in name and name.endswith("weight")]
    for name in names:
        a, b = seen[0].payload[name].ravel().astype(np.float64), coarse.payload[name].ravel()
        real = float(np.sqrt(np.mean((b - a * float(a @ b) / float(a @ a)) ** 2)))
        assert share * real < codec_noise(coarse)[name] < 3 * real
    assert codec_noise(seen[0]) == {}
