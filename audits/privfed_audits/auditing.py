"""The audit of a run: for each view, what the best attack proves about epsilon, beside what the receipt claims.

Membership by canaries gives a bound on epsilon, for a coin decided whether each was in the training data. Without
canaries the same attacks are run on training records against test records: how well they can be told apart says what
leaks, and bounds nothing, since nobody tossed a coin for them. Where a run of a text classifier was recorded, its
training texts are also looked for in the updates.

Scores are kept in ``audit/scores/``: an audit that is stopped goes on with the attack that was under way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.config import parse_config
from privfed.errors import ConfigError, PrivfedError, unknown_name
from privfed.federation.canaries import read_coins
from privfed.federation.folder import reopen
from privfed.federation.shared import SharedWork
from privfed.federation.transcript import Transcript, TranscriptError
from privfed.files import write_atomic
from privfed.report.html import write_report
from privfed.report.receipt import read_receipt, with_audit, write_receipt
from privfed.run_config import RunConfig
from privfed.types import VIEWS, View
from privfed_attacks.inversion import ATTACKS
from privfed_attacks.membership import MEMBERSHIP
from privfed_attacks.sealed import Sealed
from privfed_audits.canaries import Scene, attacks_of, canary_scene, views_of
from privfed_audits.claims import Claim, claim_of, curve_points
from privfed_audits.gallery_page import FILE as PAGE
from privfed_audits.gallery_page import write_gallery
from privfed_audits.membership import NOT_RANDOMISED, untossed, untossed_scene
from privfed_audits.verdict import verdict

SCHEMA = 1
FOLDER, FILE = "audit", "audit.json"
ALPHA = 0.05
Floats = NDArray[np.float64]
Say = Callable[[str], None]
_ON_RECEIPT = ("empirical_epsilon", "interval", "attack", "bound", "canaries", "confidence")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A run as it was read, and what ``audit`` was asked about it."""

    folder: Path
    config: RunConfig
    receipt: Mapping[str, Any]
    transcript: Transcript | None
    view: View | None
    attacks: Sequence[str] | None
    clients: int
    say: Say
    shared: SharedWork
    as_if_secret: bool


def audit(
    folder: Path,
    *,
    attacks: Sequence[str] | None = None,
    view: View | None = None,
    clients: int = 1,
    say: Say = lambda _line: None,
    shared: SharedWork | None = None,
    as_if_secret: bool = False,
) -> dict[str, Any]:
    """Attack a finished run; write ``audit/audit.json`` into its folder and what was proved into its receipt.

    Texts that were found are also beside their originals in ``audit/gallery.html``.

    The bounds of all views hold together with 95% confidence.

    Args:
        folder: The run folder.
        attacks: Names of attacks to keep to, on membership or inversion; None for all that the run allows.
        view: The view to keep to; None for all that the run allows.
        clients: Of how many clients single updates are inverted.
        say: Told what takes long.
        shared: What other runs of a grid, or this one's training, have computed already; None for nothing yet.
        as_if_secret: Hold an experiment whose noise is reproducible to what it would guarantee were the noise secret.

    Raises:
        ConfigError: If there is no run, it is not finished, or it does not allow what is asked for.
        ResumeError: If the coins of its canaries are gone.
    """
    if not (folder / "run.json").is_file():
        raise ConfigError(f"There is no run in {folder}: pass a folder that `privfed train` wrote.")
    _, raw = reopen(folder)
    config = parse_config(raw, where=str(folder / "config.toml"))
    receipt = read_receipt(folder / "receipt.json")
    _check_names(attacks)
    asked = _Asked(
        folder=folder,
        config=config,
        receipt=receipt,
        transcript=_transcript(folder),
        view=view,
        attacks=attacks,
        clients=clients,
        say=say,
        shared=SharedWork() if shared is None else shared,  # membership and inversion read the same data
        as_if_secret=as_if_secret,
    )
    found = {
        "schema": SCHEMA,
        "run_id": receipt["run_id"],
        "adapter_sha256": receipt["adapter_sha256"],
        "views": _views(asked),
        "reconstruction": _reconstruction(asked),
    }
    found["contradicted"] = any(entry.get("contradicted", False) for entry in found["views"].values())
    if not found["views"] and not found["reconstruction"]:
        raise ConfigError(
            "There is nothing to attack here: train with -s audit.canaries=1000, or with -s audit.record=true."
        )
    (folder / FOLDER).mkdir(exist_ok=True)
    write_atomic(folder / FOLDER / FILE, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    if found["reconstruction"]:
        write_gallery(folder.resolve().name, found["reconstruction"], folder / FOLDER / PAGE)
    proved = {name: entry for name, entry in found["views"].items() if entry["empirical_epsilon"] is not None}
    if proved:
        entries = {name: {key: entry[key] for key in _ON_RECEIPT} for name, entry in proved.items()}
        write_receipt(folder / "receipt.json", with_audit(receipt, entries))
        if "signature" in receipt:
            say("The receipt has changed and is no longer signed: sign it again with `privfed report --sign`.")
    if proved or found["reconstruction"]:
        write_report(folder)
    return found


def accounted_tradeoff(folder: Path, view: View) -> tuple[Floats, Floats]:
    """Return (fpr, tpr): the largest true positive rate that the receipt's events allow at each false positive rate.

    1 everywhere for a view that nothing is promised to.

    Args:
        folder: The run folder.
        view: The view.

    Raises:
        ConfigError: If the run has no receipt.
    """
    return curve_points(claim_of(read_receipt(folder / "receipt.json"), view))


def contradiction(found: Mapping[str, Any]) -> str | None:
    """Return the sentence that says which claims an audit contradicts, or None."""
    wrong = [
        f"epsilon of the view {name} is at least {entry['empirical_epsilon']:.3g} (attack {entry['attack']}) and "
        f"{entry['accounted_epsilon']:.3g} is claimed"
        for name, entry in found["views"].items()
        if entry.get("contradicted")
    ]
    if not wrong:
        return None
    return f"The audit contradicts the receipt: {'; '.join(wrong)}, at delta {_delta(found):g}."


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return an audit as a plain table."""
    head = f"{'view':<11}{'attack':<32}{'AUC':>6}{'epsilon >=':>12}{'ceiling':>9}{'claimed':>9}  TPR at FPR"
    rows = [_row(name, entry) for name, entry in found["views"].items()]
    out = [head, *rows] if rows else []
    if any(entry["empirical_epsilon"] is None for entry in found["views"].values()):
        out.append(NOT_RANDOMISED)
    for name, entry in found["reconstruction"].items():
        out.append(
            f"{name}: {entry['attack']} finds {entry['token_recall']:.0%} of the tokens, guessing without updates "
            f"{entry['prior_token_recall']:.0%}; ROUGE-L {entry['rouge_l']:.2f}"
        )
    return out


def _row(name: str, entry: Mapping[str, Any]) -> str:
    rate = entry["tpr_at_fpr"]
    rates = f"{rate['tpr']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] at {rate['fpr']:g}"
    numbers = (entry["empirical_epsilon"], entry["ceiling"], entry["accounted_epsilon"])
    low, top, claimed = ("-" if value is None else f"{value:.2f}" for value in numbers)
    return f"{name:<11}{entry['attack']:<32}{entry['auc']:>6.3f}{low:>12}{top:>9}{claimed:>9}  {rates}"


def _delta(found: Mapping[str, Any]) -> float:
    return max(float(entry["delta"]) for entry in found["views"].values() if entry.get("contradicted"))


def _check_names(attacks: Sequence[str] | None) -> None:
    known = {*MEMBERSHIP.names(), *ATTACKS.names()}
    for name in attacks or ():
        if name not in known and not _is_membership(name):
            raise unknown_name("attack", name, known)


def _transcript(folder: Path) -> Transcript | None:
    try:
        return Transcript(folder)
    except TranscriptError:
        return None


def _views(asked: _Asked) -> dict[str, Any]:
    """Return the entries of all views that membership can be attacked in."""
    if asked.attacks is not None and not any(_is_membership(name) for name in asked.attacks):
        return {}
    if not asked.config.audit.canaries:
        return _untossed(asked)
    division = json.loads((asked.folder / "partition.json").read_text())
    sizes = {c["client_id"]: int(c["size"]) for c in division["clients"]}
    scene = canary_scene(asked.folder, asked.config, asked.transcript, sizes, asked.shared)
    possible = views_of(scene)
    wanted = [each for each in VIEWS if each in possible and asked.view in (None, each)]
    if not wanted:
        raise ConfigError(f"The view {asked.view} of this run shows nothing to attack: it has {', '.join(possible)}.")
    bits = read_coins(asked.folder)  # opened by the scorer alone
    found: dict[str, Any] = {}
    for each in wanted:
        try:
            scores = _kept(_scores(asked.folder, asked.receipt, scene, each, asked.say), asked.attacks)
        except ConfigError as error:  # a codec whose messages say nothing by themselves, for one
            if asked.view is not None:
                raise
            asked.say(f"{each}: {error}")
            continue
        if not scores:
            continue
        claim = claim_of(asked.receipt, each, as_if_secret=asked.as_if_secret)
        asked.say(f"{each}: what {len(scores)} attacks prove")
        found[each] = verdict(scores, Sealed(bits), claim, alpha=ALPHA / len(wanted))
    return found


def _scores(folder: Path, receipt: Mapping[str, Any], scene: Scene, view: View, say: Say) -> dict[str, Floats]:
    """Return the scores of a view by attack: those that are kept in the folder, else computed and kept."""
    found: dict[str, Floats] = {}
    for name, compute in attacks_of(scene, view, say).items():
        path = folder / FOLDER / "scores" / f"{view}-{name}.npz"
        known = _read_scores(path, receipt)
        if known is None:
            say(f"{view}: scores by {name}")
            known = {attack: np.asarray(values, dtype=np.float64) for attack, values in compute().items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.stem}.tmp.npz")
            np.savez(temporary, allow_pickle=False, adapter=np.array(receipt["adapter_sha256"]), **known)
            temporary.replace(path)
        found |= known
    return found


def _read_scores(path: Path, receipt: Mapping[str, Any]) -> dict[str, Floats] | None:
    """Return kept scores if they are of this run's result."""
    if not path.exists():
        return None
    with np.load(path) as stored:
        if str(stored["adapter"]) != receipt["adapter_sha256"]:
            return None
        return {name: stored[name] for name in stored.files if name != "adapter"}


def _untossed(asked: _Asked) -> dict[str, Any]:
    if asked.config.privacy.unit == "client" or asked.view not in (None, "release"):
        return {}
    scene = untossed_scene(asked.folder, asked.config, asked.transcript, asked.shared)
    if scene is None:
        return {}
    asked.say("release: losses of training and test records")
    claim: Claim = claim_of(asked.receipt, "release", as_if_secret=asked.as_if_secret)
    return {"release": untossed(scene, claim, asked.attacks)}


def _kept(scores: Mapping[str, Floats], attacks: Sequence[str] | None) -> dict[str, Floats]:
    """Return the scores of the attacks that were asked for; a name stands for its variants too."""
    if attacks is None:
        return dict(scores)
    return {name: values for name, values in scores.items() if any(name.startswith(each) for each in attacks)}


def _is_membership(name: str) -> bool:
    return name in MEMBERSHIP.names() or name.startswith("gradient_dot")


def _reconstruction(asked: _Asked) -> dict[str, Any]:
    """Return what inversion found, by view; nothing where the run is not a recorded text classifier."""
    names = ["span"] if asked.attacks is None else [name for name in asked.attacks if name in ATTACKS.names()]
    if not names:
        return {}
    from privfed_audits.gallery import gallery

    named = asked.attacks is not None
    if asked.transcript is None or asked.config.model.task != "sequence_classification":
        if not named:
            return {}
        if asked.transcript is None:
            Transcript(asked.folder)  # says that the run was not recorded
        raise ConfigError(
            f"Inversion attacks here are for text classifiers, and the task is {asked.config.model.task}."
        )
    if asked.view == "release":
        chosen: list[View] = ["release"]
    else:
        chosen = [asked.view] if asked.view else (["aggregate"] if asked.transcript.masked else ["individual"])
    found: dict[str, Any] = {}
    for each in chosen:
        asked.say(f"{each}: inversion by {', '.join(names)}")
        try:
            found[each] = gallery(asked.folder, names, view=each, clients=asked.clients, shared=asked.shared)
        except PrivfedError as error:
            if named:
                raise
            asked.say(f"{each}: {error}")
    return found
