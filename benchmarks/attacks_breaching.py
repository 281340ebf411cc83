"""TAG as the package ``breaching`` has it, for a run side by side with ours: somebody else's code, the same updates.

    pip install --no-deps breaching==0.1.2 omegaconf antlr4-python3-runtime==4.9.3

Of breaching (Geiping et al., MIT) the attacker is used as it is: objective (Euclidean plus L1), optimiser (BERT's Adam
with warm-up), start and step size of its configuration for TAG. Here is only what it needs to be told: a model from
embeddings to logits, the gradients, the label and the number of steps. Words are those nearest to what it found, by
cosine, as there.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from privfed_attacks.inversion import Reconstruction, Setting
from privfed_attacks.observation import Observation
from privfed_attacks.public_model import PublicModel
from privfed_attacks.text.matching import _labels


class FromEmbeddings(nn.Module):
    """The public model from embeddings to logits; its parameters are the trained tensors alone.

    Args:
        module: The model.
        observation: What was broadcast.
    """

    def __init__(self, module: nn.Module, observation: Observation) -> None:
        super().__init__()
        self._base = [module]  # in a list, so that its other parameters are not this module's
        self._names = observation.layout.names
        self.trained = nn.ParameterList([torch.tensor(observation.params[name]) for name in self._names])

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        own = dict(zip(self._names, self.trained, strict=True))
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        given = {"inputs_embeds": embeddings, "attention_mask": mask}
        logits: torch.Tensor = functional_call(self._base[0], own, args=(), kwargs=given).logits
        return logits


def tag(steps: int) -> Any:
    """Return breaching's TAG with so many steps, as a function of (observations, model, setting)."""
    _parts_of_breaching()
    from breaching.attacks.optimization_based_attack import OptimizationBasedAttacker
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        {
            "type": "tag",
            "attack_type": "optimization",
            "label_strategy": None,
            "init": "randn-trunc",
            "normalize_gradients": False,
            "objective": {
                "type": "tag-euclidean",
                "scale": 1.0,
                "task_regularization": 0.0,
                "tag_scale": 0.1,
                "scale_scheme": "linear",
            },
            "restarts": {"num_trials": 1, "scoring": "euclidean"},
            "optim": {
                "optimizer": "bert-adam",
                "signed": None,
                "step_size": 0.05,
                "boxed": False,
                "max_iterations": steps,
                "step_size_decay": "linear",
                "langevin_noise": 0.0,
                "warmup": 50,
                "grad_clip": 1.0,
                "callback": 10**6,
            },
            "differentiable_augmentations": False,
            "impl": {"dtype": "float", "mixed_precision": False, "JIT": None},
        }
    )

    def run(seen: Sequence[Observation], model: PublicModel, setting: Setting) -> Reconstruction:
        last = seen[-1]
        client, module = last.side.client, model.at(last)
        assert client is not None and setting.lengths is not None
        table = module.get_input_embeddings().weight.detach()  # type: ignore[operator]
        labels = _labels(seen, model, setting)
        rate = client.learning_rate * client.local_steps
        public = FromEmbeddings(module, last)
        metadata = types.SimpleNamespace(shape=(setting.lengths[0], table.shape[1]), modality="embeddings")
        about = {"num_data_points": 1, "labels": torch.tensor(labels), "local_hyperparams": None}
        shared = {"gradients": [-torch.tensor(last.payload[n]) / rate for n in last.layout.names], "buffers": None}
        payload = {"parameters": [p.detach() for p in public.parameters()], "buffers": [], "metadata": metadata}
        torch.manual_seed(setting.seed)
        setup = {"dtype": torch.float, "device": torch.device("cpu")}
        attacker = OptimizationBasedAttacker(public, nn.CrossEntropyLoss(), config, setup)
        with sdpa_kernel(SDPBackend.MATH):
            found, _ = attacker.reconstruct([payload], [{**shared, "metadata": about}], {})
        words = nn.functional.normalize(table - table.mean(-1, keepdim=True), dim=-1)
        chosen = (nn.functional.normalize(found["data"][0], dim=-1) @ words.T).argmax(-1)
        text = tuple(int(token) for token in chosen)
        special = set(model.tokenizer.all_special_ids)
        return Reconstruction(tokens=frozenset(text) - special, sequences=(text,), labels=dict(Counter(labels)))

    return run


def _parts_of_breaching() -> None:
    """Make breaching's attackers importable without its data sets and metrics, which need torchvision and hydra.

    Its scripted losses run as plain functions: scripting is deprecated, and warns.
    """
    if "breaching" in sys.modules:
        return
    torch.jit.script = lambda function, *_args, **_options: function
    found = importlib.util.find_spec("breaching")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("--package needs the package breaching: see the first lines of attacks_breaching.py.")
    root = Path(found.submodule_search_locations[0])
    for name in ("", ".attacks", ".cases", ".cases.models"):
        package = types.ModuleType(f"breaching{name}")
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[f"breaching{name}"] = package
