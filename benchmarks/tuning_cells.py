"""What the cells of benchmarks/tunings.py are: data sets, tunings, learning rates, and the overrides of each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """One data set.

    Attributes:
        preset: The preset whose model, data, partition and warm start are taken.
        files: Training and test file, and of how many rows each a fixed subset is taken (0 for all).
        settings: Overrides of the preset.
        blocks: Which transformer blocks are tuned; empty for all, by each tuning's own default.
        targets: Names of the query and value layers.
        unit: The privacy unit.
        metric: What is shown.
    """

    preset: str
    files: tuple[tuple[str, int], tuple[str, int]]
    settings: tuple[str, ...]
    blocks: tuple[int, ...] = ()
    targets: tuple[str, ...] = ("query", "value")
    unit: str = "example"
    metric: str = "accuracy"


DATA = {
    "sst2": Data(
        preset="sst2",
        files=(("sst2_train.jsonl.gz", 8000), ("sst2_dev.jsonl.gz", 0)),
        settings=(
            "data.limit=unset",
            "partition.clients=10",
            "client.sampling_probability=0.06",
            "server.rounds=10",
            "head_warm_start.rounds=20",
            "head_warm_start.server_learning_rate=0.1",
        ),
        blocks=(5,),
    ),
    "medquad": Data(
        preset="medquad",
        files=(("medquad_train.jsonl.gz", 3000), ("medquad_test.jsonl.gz", 800)),
        settings=(
            "model.max_length=40",
            "client.sampling_probability=0.1",
            "server.rounds=20",
            "head_warm_start.rounds=20",
        ),
        blocks=(5,),
    ),
    "stackexchange": Data(
        preset="stackexchange",
        files=(("stackexchange_train.jsonl.gz", 0), ("stackexchange_test.jsonl.gz", 800)),
        settings=(
            "model.max_length=32",
            "server.rounds=8",
            "client.local_steps=1",
            "head_warm_start.name=dp_probe",
            "head_warm_start.rounds=25",
            "head_warm_start.optimizer=sgd",
            "head_warm_start.learning_rate=1.0",
            "head_warm_start.local_steps=2",
            "head_warm_start.server_learning_rate=2.0",
            "privacy.mechanism=gaussian",
        ),
        blocks=(5,),
        unit="client",
    ),
    "shakespeare": Data(
        preset="shakespeare",
        files=(("shakespeare_train.jsonl.gz", 0), ("shakespeare_test.jsonl.gz", 500)),
        settings=(
            "partition.clients=10",
            "client.sampling_probability=0.1",
            "server.rounds=12",
            "evaluate.generate=0",
        ),
        targets=("q_proj", "v_proj"),
        metric="perplexity",
    ),
    "pneumonia": Data(
        preset="pneumonia",
        files=(("pneumoniamnist_train.safetensors", 0), ("pneumoniamnist_test.safetensors", 0)),
        settings=(
            "client.sampling_probability=0.25",
            "server.rounds=12",
            "head_warm_start.rounds=10",
            "privacy.target_delta=1e-4",
        ),
        targets=("q_proj", "v_proj"),
    ),
}
COMMON = [
    "client.optimizer=sgd",
    "client.learning_rate=1.0",
    "client.local_steps=1",
    "client.physical_batch_size=128",
    "server.optimizer=adam",
    "server.momentum=0.0",
    "server.evaluate_clients=10",
]
REMADE = ["server.optimizer=sgd", "server.learning_rate=1.0"]
PLAIN = ["privacy.unit=none", "privacy.target_epsilon=unset", "secagg.name=none", "server.weighting=examples"]
# one share of the noise from each client: the sum has about the noise that one trusted server would add
DISTRIBUTED = ["privacy.placement=distributed", "server.weighting=uniform", "secagg.dropped=0.2"]
# the whole noise from each client: for the rules that distributed noise does not take, and what they are compared with
LOCAL = ["privacy.placement=local", "server.weighting=examples"]
CENTRAL = ["privacy.placement=central"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One row of the tables.

    Attributes:
        name: ``tuning.name``.
        family: Which learning rate it takes.
        options: Of the tuning, by key.
        rule: ``server.aggregation``.
        local: Whether its private run has the whole noise on each client.
        short: For a model of which only some blocks are tuned: how the tuning is told so. ``targets``: by name and
            number of block; ``names``: by the patterns below; ``all``: it cannot be told and takes all blocks.
        meter: Whether the meter of averaged factors runs along (not with distributed noise).
        remade: Whether the rule makes the factors anew each round, so that no server optimiser can remember them: the
            server takes the average as it is, and the rate is that of the clients' one step.
    """

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    rule: str = "fedavg"
    local: bool = False
    short: str = "targets"
    meter: bool = False
    remade: bool = False


WAYS = {
    "head": Way(name="head", family="head", short="all"),
    "ffa_lora": Way(name="ffa_lora", family="low rank", meter=True),
    "lora (FedIT)": Way(name="lora", family="low rank", meter=True),
    "fed_sb": Way(name="fed_sb", family="low rank", options={"r": 16}, meter=True),
    "bitfit": Way(name="bitfit", family="vectors", short="names"),
    "ia3": Way(name="ia3", family="vectors", short="names"),
    "adapter (Houlsby)": Way(name="adapter", family="low rank", options={"bottleneck": 16}, short="names"),
    "full": Way(name="full", family="whole", short="names"),
    "rolora, local noise": Way(name="lora", family="low rank", rule="rolora", local=True, meter=True),
    "ffa_lora, local noise": Way(name="ffa_lora", family="low rank", local=True, meter=True),
    "lora (FedIT), local noise": Way(name="lora", family="low rank", local=True, meter=True),
    "fedsa_lora, local noise": Way(name="lora", family="low rank", rule="fedsa_lora", local=True),
    "dora": Way(name="dora", family="low rank"),
    "rslora": Way(name="rslora", family="low rank"),
    "vera": Way(name="vera", family="vectors", options={"r": 64}),
    "ln_tuning": Way(name="ln_tuning", family="vectors", short="names"),
    "oft": Way(name="oft", family="low rank"),
    "boft": Way(name="boft", family="low rank"),
    "loha": Way(name="loha", family="low rank"),
    "lokr": Way(name="lokr", family="low rank"),
    "fourierft": Way(name="fourierft", family="frequencies", options={"n_frequency": 500}),
    "federa": Way(name="federa", family="low rank", meter=True),
    "fedsvd, local noise": Way(name="ffa_lora", family="remade", rule="fedsvd", local=True, remade=True),
    "frlora, local noise": Way(name="lora", family="remade", rule="frlora", local=True, remade=True),
    "p_tuning": Way(name="p_tuning", family="prompts", options={"num_virtual_tokens": 8}, short="all"),
    "prefix_tuning": Way(name="prefix_tuning", family="prompts", options={"num_virtual_tokens": 8}, short="all"),
    "prompt_tuning": Way(name="prompt_tuning", family="prompts", options={"num_virtual_tokens": 8}, short="all"),
}
# Adam's on the server, by family and whether there is privacy: the best of three by data set on seed 0 (--search), with
# the first tuning of the family. Private heads take the presets' own of the warm start
RATES: dict[str, dict[bool, dict[str, float]]] = {
    "sst2": {
        True: {"low rank": 3e-2, "vectors": 3e-2, "whole": 3e-3},
        False: {"low rank": 1e-2, "vectors": 3e-3, "whole": 3e-4},
    },
    "medquad": {
        True: {"low rank": 3e-2, "vectors": 1e-2, "whole": 3e-3},
        False: {"low rank": 3e-2, "vectors": 3e-2, "whole": 1e-3},
    },
    "stackexchange": {
        True: {"low rank": 1e-2, "vectors": 3e-2, "whole": 3e-3},
        False: {"low rank": 3e-2, "vectors": 1e-2, "whole": 3e-3},
    },
    "shakespeare": {
        True: {"low rank": 3e-2, "vectors": 3e-2, "whole": 3e-3},
        False: {"low rank": 3e-2, "vectors": 3e-2, "whole": 3e-3},
    },
    "pneumonia": {
        True: {"low rank": 1e-2, "vectors": 1e-2, "whole": 3e-3},
        False: {"low rank": 3e-3, "vectors": 1e-3, "whole": 3e-4},
    },
}
# of families that were not searched on each data set: prompts on none, the others on pneumonia
ELSEWHERE = {"prompts": 1e-2, "frequencies": 1e-1, "remade": 3e-2}
HEAD_RATES = {
    True: {"sst2": 0.05, "medquad": 0.3, "stackexchange": 0.05, "pneumonia": 0.1},
    False: {"sst2": 0.03, "medquad": 0.03, "stackexchange": 0.03, "pneumonia": 0.03},
}
SEARCHED = {
    "low rank": (3e-3, 1e-2, 3e-2),
    "vectors": (3e-3, 1e-2, 3e-2),
    "whole": (3e-4, 1e-3, 3e-3),
    "frequencies": (1e-2, 1e-1, 1.0),
}
SEARCHED_HEADS = (0.01, 0.03, 0.1)
MAIN = (None, 8.0)
# parts of BERT's block {} for tunings that are told by name
NAMES: dict[str, dict[str, list[str]]] = {
    "ia3": {
        "target_modules": ["layer.{}.attention.self.key", "layer.{}.attention.self.value", "layer.{}.output.dense"],
        "feedforward_modules": ["layer.{}.output.dense"],
    },
    "adapter": {"target_modules": ["layer.{}.attention.output.dense", "layer.{}.output.dense"]},
    "ln_tuning": {"target_modules": ["layer.{}.attention.output.LayerNorm", "layer.{}.output.LayerNorm"]},
    "bitfit": {"select": ["layer.{}.*.bias"]},
    "full": {"select": ["layer.{}.*"]},
}


def tuning_settings(way: Way, data: Data) -> list[str]:
    """Return the overrides that choose what is trained."""
    name, options = way.name, dict(way.options)
    if data.blocks and way.short == "names":
        blocks = {key: [p.format(b) for b in data.blocks for p in parts] for key, parts in NAMES[name].items()}
        options |= blocks
        name = "select" if "select" in blocks else name
    elif way.short == "targets":
        options["target_modules"] = list(data.targets)
        if data.blocks:
            options["layers_to_transform"] = list(data.blocks)
    return [f"tuning.name={name}", *(f"tuning.{key}={json.dumps(value)}" for key, value in options.items())]


def settings_of(label: str, data_name: str, epsilon: float | None, rate: float | None) -> list[str]:
    """Return all overrides of a cell but its files and seed."""
    way, data = WAYS[label], DATA[data_name]
    private = epsilon is not None
    rate = rate or (
        HEAD_RATES[private].get(data_name) if way.family == "head" else RATES[data_name][private].get(way.family)
    )
    rate = rate or ELSEWHERE.get(way.family, 1e-2)  # a head where the task has none is refused whatever its rate
    if epsilon is None:
        privacy = [*PLAIN, *warm_rate(way, data_name)]
    else:
        placed = CENTRAL if data.unit == "client" else LOCAL if way.local else DISTRIBUTED
        privacy = [f"privacy.target_epsilon={epsilon}", *placed]
    metered = way.meter and (epsilon is None or (way.local and data.unit == "example"))
    return [
        *COMMON,
        *data.settings,
        *tuning_settings(way, data),
        f"server.aggregation={way.rule}",
        *(REMADE if way.remade else []),
        f"{'client' if way.remade else 'server'}.learning_rate={rate}",
        f"server.meter={json.dumps(metered)}",
        "server.evaluate_every=1000",
        *(head_alone(data) if way.name == "head" else []),
        *privacy,
    ]


def head_alone(data: Data) -> list[str]:
    """Return the overrides of a head alone: no warm start, and the whole budget for the steps that a warm start takes.

    Its features are computed once, so all examples take part in each of its steps.
    """
    steps = ["server.rounds=30"] if data.unit == "client" else ["server.rounds=30", "client.sampling_probability=1.0"]
    return ["head_warm_start.name=none", "client.physical_batch_size=1024", *steps]


def warm_rate(way: Way, data_name: str) -> list[str]:
    """Return the override of a warm start without noise: Adam's step there as of a head alone, without privacy."""
    if data_name not in HEAD_RATES[False] or way.name == "head" or data_name == "stackexchange":
        return []
    return [f"head_warm_start.server_learning_rate={HEAD_RATES[False][data_name]}"]
