"""What a run leaves behind: the adapter (or the whole model), and each client's own where parts are personal."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

from privfed.federation.engines.in_process import set_state
from privfed.federation.personal import PERSONAL, folder_name
from privfed.federation.setup import Stage
from privfed.federation.state import ServerState
from privfed.tuning import TunedModel
from privfed.tuning.layout import write_flat

WHOLE_MODEL = (
    "adapter/ holds a whole model in transformers' format, not an adapter: server.aggregation = {rule!r} changes base "
    "weights, and the factors alone would not reproduce it."
)
PERSONAL_PARTS = (
    "adapter/ holds the shared parts with the personal ones ({names}) at their start; what is released covers the "
    "shared parts only. clients/ holds each simulated client's own model, which in a deployment never leaves it."
)

CLIENTS = (
    "clients_mean and clients_worst_tenth, of each client's {metric} on {basis}, are simulation figures: computed from "
    "the clients' data without noise, and not part of the release."
)


def save_model(tuned: TunedModel, stage: Stage, folder: Path) -> None:
    """Write the server's model to ``folder``: an adapter, or the merged model where the rule changed base weights.

    Merging is in place: after it the module computes the same without an adapter.
    """
    if not stage.phase.sharing.rule.changes_base:
        tuned.save(folder)
        return
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 by a name that it is about to drop
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        merged = tuned.model.merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(str(folder))


def save_clients(tuned: TunedModel, stage: Stage, state: ServerState, folder: Path) -> int:
    """Write the model of each client that has personal parts to a folder of its own; return how many.

    ``folder`` is there whole or not at all; ``index.json`` in it maps its folders to client ids.
    """
    phase = stage.phase
    if phase.store is None or not phase.sharing.personal.size:
        return 0
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    index = {}
    for client_id in phase.clients:
        own = phase.store.load(client_id, before=state.round + 1)
        if PERSONAL in own:
            write_flat(stage.module, phase.sharing.personal.put(state.params_D, own[PERSONAL]))
            tuned.save(temporary / folder_name(client_id))
            index[folder_name(client_id)] = client_id
    text = json.dumps(index, ensure_ascii=False, indent=1)
    (temporary / "index.json").write_text(text + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    set_state(stage, state)
    return len(index)


def notes(stage: Stage) -> tuple[str, ...]:
    """Return what a receipt has to say about the saved model."""
    sharing, found = stage.phase.sharing, []
    if sharing.rule.changes_base:
        found.append(WHOLE_MODEL.format(rule=stage.phase.server.rule))
    if sharing.personal.size:
        names = sharing.personal.names
        shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        found.append(PERSONAL_PARTS.format(names=shown))
    if stage.fairness is not None:
        found.append(CLIENTS.format(metric=stage.fairness.metric, basis=stage.fairness.basis))
    return tuple(found)
