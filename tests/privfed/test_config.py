"""RunConfig: precedence, overrides, round trips, and a sentence for everything that cannot hold."""

from __future__ import annotations

import re
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.config import (
    RunConfig,
    differences,
    load_budget_config,
    load_config,
    parse_config,
    presets,
)
from privfed.errors import ConfigError, UnknownNameError

MINIMAL = """
seed = 5
[tuning]
name = "lora"
r = 4
[server]
rounds = 3
[data]
name = "pydoc"
"""


BASE = """
seed = 7
[data]
name = "pydoc"
limit = 600
[partition]
name = "iid"
clients = 4
[client]
sampling_probability = 0.1
local_steps = 2
[server]
rounds = 3
cohort_size = 3
[privacy]
target_epsilon = 8.0
target_delta = 1e-4
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own that holds ``base.toml``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.toml").write_text(BASE)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return str(path)


def sentence(*overrides, source="base.toml"):
    """Return the message of the ConfigError that these overrides of ``source`` give."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "\n" not in text and text[-1] in ".?" and "Traceback" not in text and "pydantic" not in text
    return text


# --- precedence and overrides -------------------------------------------------------------------------------------


def test_defaults_give_way_to_the_file_and_the_file_to_overrides(file):
    default, from_file = RunConfig(), load_config(file)
    assert (default.server.rounds, default.tuning.name) == (10, "ffa_lora")
    assert (from_file.server.rounds, from_file.tuning.name, from_file.tuning.r) == (3, "lora", 4)
    assert from_file.server.learning_rate == default.server.learning_rate
    assert from_file.privacy == default.privacy
    overridden = load_config(file, ["server.rounds=7", "seed=9", "server.rounds = 8"])
    assert (overridden.server.rounds, overridden.seed, overridden.tuning.r) == (8, 9, 4)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("model.name=some/name", lambda c: c.model.name, "some/name"),
        ('model.name="quoted name"', lambda c: c.model.name, "quoted name"),
        ("model.name='1e3'", lambda c: c.model.name, "1e3"),
        ("model.revision=v=1", lambda c: c.model.revision, "v=1"),
        ("client.learning_rate=3e-4", lambda c: c.client.learning_rate, 3e-4),
        ("client.learning_rate=1", lambda c: c.client.learning_rate, 1.0),
        ("privacy.reproducible_noise=true", lambda c: c.privacy.reproducible_noise, True),
        ('tuning.target_modules=["query", "key"]', lambda c: c.tuning.target_modules, ["query", "key"]),
        ("tuning.r=16", lambda c: c.tuning.r, 16),
        ("data.limit=unset", lambda c: c.data.limit, None),
        ("secagg.name=none", lambda c: c.secagg.name, "none"),
        ("head_warm_start.name=none", lambda c: c.head_warm_start.name, "none"),
        ("privacy.unit=none", lambda c: c.privacy.unit, "none"),
        ("data.path=rows.csv", lambda c: (c.data.path, c.data.name), ("rows.csv", None)),
    ],
)
def test_an_override_is_toml_or_a_bare_word(override, read, value):
    assert read(load_config("base.toml", [override])) == value


def test_choosing_another_plug_in_resets_its_table(file):
    found = load_config(file, ["tuning.name=ffa_lora"])
    assert found.tuning.r == type(found.tuning)().r == 8
    assert load_config(file, ["tuning.name=head"]).tuning.model_dump() == {"name": "head"}
    assert load_config(file, ["tuning.name=lora"]).tuning.r == 4  # the same name resets nothing
    warm = load_config(file, ["head_warm_start.name=dp_probe", "head_warm_start.rounds=3"]).head_warm_start
    assert (warm.name, warm.rounds) == ("dp_probe", 3)


def test_an_option_beside_another_name_is_kept_in_either_order(file):
    for overrides in (["tuning.name=ffa_lora", "tuning.r=2"], ["tuning.r=2", "tuning.name=ffa_lora"]):
        tuning = load_config(file, overrides).tuning
        assert (tuning.name, tuning.r) == ("ffa_lora", 2)


def test_naming_the_default_resets_nothing(tmp_path):
    path = tmp_path / "unnamed.toml"
    path.write_text("[tuning]\nr = 3\n")
    assert load_config(str(path), ["tuning.name=ffa_lora"]).tuning.r == 3
    assert load_config(str(path), ["tuning.name=lora"]).tuning.r == 8


def test_a_file_that_exists_wins_over_a_preset_of_its_name(tmp_path):
    name = next(iter(presets()))
    assert load_config(name).seed != 99
    (tmp_path / name).write_text("seed = 99\n")
    assert load_config(name).seed == 99


# --- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", presets())
def test_every_preset_is_valid_and_survives_toml(preset):
    import tomllib

    found = load_config(preset)
    assert parse_config(tomllib.loads(found.to_toml()), where="again") == found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    rate=st.floats(1e-9, 10),
    epsilon=st.floats(1e-3, 100),
    text=st.text(min_size=1).filter(lambda t: t not in ("label", "c")),
    tuning=st.sampled_from(["lora", "ffa_lora", "bitfit", "head", "full"]),
    partition=st.sampled_from(["iid", "dirichlet", "quantity", "by_column"]),
    codec=st.sampled_from(["identity", "stochastic_quantizer"]),
)
def test_a_configuration_survives_toml_with_its_digest(seed, rate, epsilon, text, tuning, partition, codec):
    import tomllib

    raw = {
        "seed": seed,
        "data": {"path": "rows.csv", "text": text, "client": "c"},
        "client": {"learning_rate": rate},
        "privacy": {"target_epsilon": epsilon},
        "tuning": {"name": tuning},
        "partition": {"name": partition},
        "compression": {"name": codec},
    }
    found = parse_config(raw, where="here")
    again = parse_config(tomllib.loads(found.to_toml()), where="again")
    assert again == found
    assert again.to_toml() == found.to_toml()
    assert again.digest() == found.digest()
    assert differences(found, again) == []


def test_the_digest_follows_values_and_not_how_they_were_given(file):
    base = load_config(file)
    assert re.fullmatch("[0-9a-f]{64}", base.digest())
    assert load_config(file, ["tuning.r=4", "server.rounds=3", "client.local_steps=5"]).digest() == base.digest()
    assert load_config(file, ["tuning.r=5"]).digest() != base.digest()


def test_differences_name_the_keys(file):
    left, right = load_config(file), load_config(file, ["tuning.r=5", "data.limit=10", "tuning.name=lora"])
    assert differences(left, right) == ["data.limit: 'unset' -> 10", "tuning.r: 4 -> 5"]
    assert differences(right, left)[1] == "tuning.r: 5 -> 4"
    assert differences(left, left) == []


def test_tables_are_frozen():
    found = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        found.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        found.privacy.l2_clip_norm = 9.0


# --- what cannot hold ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("tunning.r=4", ["Unknown key 'tunning'", "'tuning'"]),
        ("tuning.rr=4", ["Unknown key 'tuning.rr'", "'r'"]),
        ("client.optimiser=sgd", ["Unknown key 'client.optimiser'", "'optimizer'"]),
        ("compression.bits=4", ["Unknown key 'compression.bits'", "Known: name, max_value"]),
        ("sed=4", ["Unknown key 'sed'", "'seed'"]),
        ("tuning.name=loraa", ["Unknown tuning 'loraa'", "'lora'", "Known: adalora"]),
        ("compression.name=zip", ["Unknown codec 'zip'", "Known: bernoulli_mask, cast"]),
        ("partition.name=direchlet", ["Unknown partitioner", "Did you mean 'dirichlet'"]),
        ("privacy.target_epsilon=0", ["target_epsilon is 0", "above 0"]),
        ("privacy.target_epsilon=-2", ["target_epsilon is -2", "above 0"]),
        ("privacy.target_epsilon=nan", ["privacy.target_epsilon = nan", "finite"]),
        ("privacy.target_epsilon=inf", ["privacy.target_epsilon = inf", "finite"]),
        ("privacy.target_epsilon=eight", ["privacy.target_epsilon = 'eight'", "valid number"]),
        ("privacy.target_epsilon=unset", ["neither target_epsilon nor noise_multiplier"]),
        ("privacy.noise_multiplier=1.5", ["target_epsilon = 8 and noise_multiplier = 1.5", "unset"]),
        ("privacy.noise_multiplier=0", ["privacy.noise_multiplier = 0", "greater than 0"]),
        ("privacy.target_delta=1", ["privacy.target_delta = 1", "less than 1"]),
        ("privacy.target_delta=0", ["privacy.target_delta = 0", "greater than 0"]),
        ("privacy.placement=central", ["unit = 'example' with placement = 'central'", "placement = 'local'"]),
        ("privacy.placement=remote", ["privacy.placement = 'remote'", "'local', 'central' or 'distributed'"]),
        ("privacy.unit=people", ["privacy.unit = 'people'", "'example', 'client' or 'none'"]),
        ("privacy.l2_clip_norm=inf", ["privacy.l2_clip_norm = inf", "finite"]),
        ("privacy=1", ["privacy = 1", "expected a table"]),
        ("tuning=lora", ["tuning", "expected a table with a name", "'lora'"]),
        ("tuning.name=3", ["name must be a string", "3"]),
        ("server.cohort_size=1", ["server.cohort_size = 1", "masked", 'secagg.name = "none"']),
        ("server.rounds=2.5", ["server.rounds = 2.5", "integer"]),
        ("server.rounds=0", ["server.rounds = 0", "greater than or equal to 1"]),
        ("seed=true", ["seed = True", "integer"]),
        ("client.batch_size=16", ["batch_size = 16 and sampling_probability = 0.1", "one of them", "unset"]),
        ("client.sampling_probability=1.5", ["sampling_probability = 1.5", "less than or equal to 1"]),
        ("model.task=translation", ["model.task = 'translation'", "'sequence_classification'"]),
        ("secagg.threshold=0.7", ["secagg.threshold = 0.7", "secagg.dropped", "dropped = 1 - threshold"]),
        ("secagg.dropped=0.6", ["secagg.dropped = 0.6", "less than 0.5"]),
        ("secagg.dropped=0.48", ["secagg.dropped = 0.48", "secagg.corrupt = 0.1", "2 dropped + corrupt", "lower one"]),
        ("secagg.n_min=1", ["secagg.n_min = 1", "greater than or equal to 2"]),
        ("secagg.ring_bits=18", ["secagg.ring_bits = 18", "'auto', 16, 20, 24 or 32"]),
        ("secagg.sigma=5", ["secagg.sigma = 5", "greater than or equal to 20"]),
        ("secagg.server=honest", ["secagg.server = 'honest'", "'malicious' or 'curious'"]),
        ("audit.record=3", ["audit.record = 3", "boolean"]),
        ("data.name=unset", ["neither name nor path", "set name = 'pydoc'"]),
        ("privacy.mechanism=gausian", ["Unknown mechanism 'gausian'", "Did you mean 'gaussian'"]),
        ("privacy.mechanism.nam=3", ["Unknown key 'privacy.mechanism.nam'", "'name'"]),
        ("seed.x=3", ["-s seed.x=3", "'seed' is a value, not a table"]),
        ("seed", ["-s seed", "expected key=value"]),
        ("=3", ["-s =3", "expected key=value"]),
    ],
)
def test_a_bad_value_is_one_sentence_with_what_was_given_and_expected(override, parts):
    text = sentence(override)
    for part in parts:
        assert part in text


def test_tables_that_contradict_each_other():
    text = sentence("privacy.unit=client", "server.weighting=examples")
    assert 'server.weighting = "examples" with privacy.unit = "client"' in text and 'weighting = "uniform"' in text
    assert load_config("base.toml", ["server.cohort_size=1", "secagg.name=none"]).server.cohort_size == 1


def test_a_clip_beyond_the_codecs_range_would_let_data_decide_who_drops_out():
    client = ["privacy.unit=client", "privacy.l2_clip_norm=17"]
    text = sentence(*client)
    assert "privacy.l2_clip_norm = 17 is above compression.max_value = 16" in text and "raise max_value" in text
    assert load_config("base.toml", [*client, "compression.max_value=17"]).privacy.l2_clip_norm == 17
    assert load_config("base.toml", [*client, "secagg.name=none"]).privacy.l2_clip_norm == 17


def test_every_problem_is_told_at_once():
    text = sentence("tuning.q=2", "privacy.rate=1", "server.rounds=0")
    assert "'tuning.q'" in text and "'privacy.rate'" in text and "server.rounds = 0" in text


def test_sources_that_cannot_be_read(tmp_path):
    assert "There is no file 'nowhere.toml'" in sentence(source="nowhere.toml")
    assert f"one of the presets {', '.join(presets())}." in sentence(source="folder/nowhere")
    with pytest.raises(UnknownNameError, match=r"Unknown preset 'tinny'\. Did you mean 'tiny'") as caught:
        load_config("tinny")
    assert isinstance(caught.value, ConfigError)
    bad = tmp_path / "bad.toml"
    for content, expected in [(b"seed = ", "not valid TOML"), (b"seed = 1\nx = '\xff'", "not UTF-8 (byte 14)")]:
        bad.write_bytes(content)
        assert expected in sentence(source=str(bad))


# --- both an epsilon and a noise multiplier -----------------------------------------------------------------------


def test_a_question_about_rounds_takes_both():
    found, both = load_budget_config("base.toml", ["privacy.noise_multiplier=1.5", "privacy.target_epsilon=3"])
    assert both and (found.privacy.noise_multiplier, found.privacy.target_epsilon) == (1.5, 3.0)
    found, both = load_budget_config("base.toml")
    assert not both and found == load_config("base.toml")
    found, both = load_budget_config("base.toml", ["privacy.noise_multiplier=1.5", "privacy.target_epsilon=unset"])
    assert not both and found.privacy.noise_multiplier == 1.5
    for target in ("0", "-1", "nan", "inf", "true", "many"):
        with pytest.raises(ConfigError, match=r"privacy\.target_epsilon is .*, expected a finite number above 0"):
            load_budget_config("base.toml", ["privacy.noise_multiplier=1.5", f"privacy.target_epsilon={target}"])


def test_dropout_is_refused_where_each_examples_gradient_has_to_be_checked():
    with pytest.raises(ConfigError, match=r"model\.dropout = 0\.1 with privacy\.unit.*set model\.dropout"):
        parse_config({"model": {"dropout": 0.1}}, where="run.toml")
    privacy = {"unit": "client", "target_epsilon": 8.0}
    assert parse_config({"model": {"dropout": 0.1}, "privacy": privacy}, where="run.toml").model.dropout == 0.1


def test_one_personal_pattern_needs_no_list():
    found = load_config("tiny", ["server.personal=head"])
    assert found.server.personal == ["head"]
    assert parse_config(found.to_dict(), where="again") == found


@pytest.mark.parametrize(
    ("n_min", "parts"),
    [(5, ["cohort_size = 10", "n_min = 5", "use at least 6"]), (8, ["cohort_size = 10", "n_min = 8", "only 7 of 10"])],
)
def test_a_sum_that_cannot_be_safe_is_refused_with_the_cohort(n_min, parts):
    text = sentence("server.cohort_size=10", f"secagg.n_min={n_min}")
    assert all(part in text for part in parts)
    assert load_config("base.toml", ["server.cohort_size=10", "secagg.n_min=7"]).secagg.requirements().n_min == 7
    load_config("base.toml", ["server.cohort_size=10", f"secagg.n_min={n_min}", "secagg.name=none"])


def test_the_ring_is_what_the_codec_needs_unless_it_is_given():
    assert load_config("base.toml").ring_bits(10) == 32
    assert load_config("base.toml", ["secagg.ring_bits=24"]).ring_bits(10) == 24
    rings = {
        bits: load_config("base.toml", ["compression.name=stochastic_quantizer", f"compression.bits={bits}"]).ring_bits(
            20
        )
        for bits in (8, 12, 16)
    }
    assert rings == {8: 16, 12: 20, 16: 24}  # 20 times 2^(bits - 1) - 1 has to stay below 2^(ring - 1)


CLIENT_LEVEL = ["privacy.unit=client", "head_warm_start.name=none", "server.cohort_size=10"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["compression.name=top_k"], ['"top_k"', '"masked"', "do not add up", 'use compression.name = "random_k"']),
        (["compression.name=svd_truncate"], ['"svd_truncate"', "do not add up", '"powersgd", or secagg.name = "none"']),
        (["compression.name=cast"], ['"cast"', "do not add up", 'use compression.name = "stochastic_quantizer"']),
        (
            ["compression.name=powersgd", 'compression.inner={name="cast"}'],
            ['compression.inner.name = "cast"', "masked", 'use compression.inner.name = "stochastic_quantizer"'],
        ),
        (
            ["compression.name=random_k", 'compression.inner={name="random_k", inner={name="cast"}}'],
            ['compression.inner.inner.name = "cast"', "masked", "do not add up"],
        ),
        (["compression.name=sign", "server.weighting=examples"], ["sign", "weighting", "uniform"]),
        (
            ["compression.name=count_sketch", "server.aggregation=flexlora", "tuning.name=lora", "secagg.name=none"],
            ['"count_sketch"', '"flexlora"', "decodes sums only", 'use compression.name = "random_k"'],
        ),
        (
            ["compression.name=count_sketch", "server.meter=true"],
            ['"count_sketch"', "server.meter = true", "set server.meter = false"],
        ),
        (
            ["compression.name=sign", "server.aggregation=scaffold", "client.optimizer=sgd"],
            ['"sign"', '"scaffold"', "no average of updates", '"stochastic_quantizer"'],
        ),
        *(
            (
                [f"compression.name={name}", "privacy.mechanism=banded", *CLIENT_LEVEL],
                [f'"{name}"', '"banded"', said, 'use mechanism = "gaussian"'],
            )
            for name, said in {
                "powersgd": "two sums a round",
                "random_k": "other values in each",
                "global_mask": "other values in each",
                "seed_projection": "other values in each",
                "rotated_quantizer": "other values in each",
            }.items()
        ),
        (
            ["compression.name=count_sketch", *CLIENT_LEVEL],
            ["l2_clip_norm", "'count_sketch' carries", "bound max_norm"],
        ),
        (
            ["compression.name=random_k", 'compression.inner={name="identity", max_value=0.1}', *CLIENT_LEVEL],
            ["l2_clip_norm = 0.5", "above the 0.1 that 'random_k' carries", "raise inner.max_value"],
        ),
        (
            [
                *("compression.name=cast", "compression.dtype=float16", "secagg.name=none"),
                *("privacy.l2_clip_norm=7e4", *CLIENT_LEVEL),
            ],
            ["l2_clip_norm = 70000", "65504"],
        ),
        (
            ["compression.name=random_k", "compression.error_feedback=true"],
            ["error_feedback", "unbiased = true", "set compression.unbiased = false"],
        ),
        (
            ["compression.name=random_k", "privacy.placement=distributed", "privacy.accountant=rdp"],
            ["'random_k'", "distributed", 'use compression.name = "identity"'],
        ),
        (["downlink.name=count_sketch"], ['downlink.name = "count_sketch"', "cannot encode a broadcast", '"cast"']),
        (["downlink.name=powersgd"], ['downlink.name = "powersgd"', "cannot encode a broadcast"]),
        (["downlink.name=zip"], ["Unknown codec 'zip'"]),
        (["downlink.name=cast", "downlink.bits=4"], ["Unknown key 'downlink.bits'", "Known: name, dtype"]),
    ],
)
def test_codecs_that_the_rounds_cannot_serve_are_refused(overrides, parts):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", overrides)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["compression.name=count_sketch", "privacy.mechanism=banded", "secagg.name=none", *CLIENT_LEVEL],
        ["compression.name=count_sketch", "compression.max_norm=1.0", *CLIENT_LEVEL],
        ["compression.name=top_k", "privacy.mechanism=banded", "secagg.name=none", *CLIENT_LEVEL],
        ["compression.name=sign", "compression.vote=majority", *CLIENT_LEVEL],
        ["compression.name=powersgd", *CLIENT_LEVEL],
        ["compression.name=top_k", "secagg.name=none", "server.weighting=examples"],
        ["compression.name=random_k", "downlink.name=top_k", "downlink.density=0.1"],
        ["compression.name=global_mask", 'compression.inner={name="rotated_quantizer"}'],
    ],
)
def test_codecs_that_the_rounds_can_serve_are_taken(overrides):
    found = load_config("tiny", overrides)
    assert parse_config(tomllib.loads(found.to_toml()), where="again") == found


def test_rings_of_codecs_that_choose_values_are_those_of_the_nested_one():
    nested = 'compression.inner={name="stochastic_quantizer", bits=8}'
    for name in ("random_k", "count_sketch", "global_mask", "seed_projection", "powersgd"):
        assert load_config("base.toml", [f"compression.name={name}"]).ring_bits(20) == 32
        assert load_config("base.toml", [f"compression.name={name}", nested]).ring_bits(20) == 16
    assert load_config("base.toml", ["compression.name=sign"]).ring_bits(20) == 16
    rotated = ["compression.name=rotated_quantizer", "compression.bits=12"]
    assert load_config("base.toml", rotated).ring_bits(20) == 20
