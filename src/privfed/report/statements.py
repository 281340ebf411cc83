"""The sentences of a receipt: what is covered, whom to trust, what was assumed, what can still go wrong."""

from __future__ import annotations

from typing import Any

LARGE_EPSILON = 8.0
REPRODUCIBLE = "not private: the noise of this run can be recomputed from its seed"
NO_NOISE = "not private: this run trained without a privacy mechanism"

_RELEASED = {
    "every_iterate": "The global model of every round is sent to the clients and so counts as released.",
    "last": "Only the model of the last round is released; those of earlier rounds stay with the server.",
    "sum_only": "Only the sum of the clients' updates is released.",
}
_RELATIONS = {
    "add_or_remove_one": "Two data sets are neighbours if one has exactly one {unit} more than the other.",
    "replace_one": "Two data sets are neighbours if one {unit} of the first is replaced by another.",
}


def released(what: str) -> dict[str, str]:
    """Return what leaves the protected side."""
    return {"what": what, "sentence": _RELEASED[what]}


def relation(name: str, unit: str) -> str:
    """Return the neighbouring relation in words."""
    return _RELATIONS[name].format(unit=unit_noun(unit))


def unit_noun(unit: str) -> str:
    """Return what one unit of protection is called in a sentence."""
    return "client" if unit == "client" else "training example"


def trust_model(*, unit: str, placement: str, secagg: bool) -> list[str]:
    """Return whom the guarantee asks the reader to trust, one sentence each."""
    sentences = []
    if unit == "none":
        sentences.append("No noise was added anywhere: every party that sees a model or an update is trusted.")
    elif placement == "local":
        sentences.append(
            "Each client clips and adds noise on its own machine before anything leaves it, so the promise "
            "does not rest on trusting the server or the other clients."
        )
    elif placement == "distributed":
        sentences.append(
            "Each client adds only a share of the noise before its update is masked, so the promise rests on secure "
            "aggregation, on enough survivors and on enough honest clients among them, as declared; it does not rest "
            "on trusting the server to add noise."
        )
    else:
        sentences.append("The server adds the noise, so it is trusted to do so and not to misuse what it sees before.")
    if secagg:
        sentences.append(
            "Secure aggregation hides single updates even from a server that lies, as long as no more clients work "
            "with it than declared (secagg.corrupt); the server learns the sum of a round."
        )
    else:
        sentences.append("There is no secure aggregation: the server sees the update of every single client.")
    sentences.append("Every client is trusted to run the unchanged training code on its own data.")
    return sentences


def coverage(private: bool) -> dict[str, dict[str, Any]]:
    """Return which accesses to the data the guarantee covers."""
    training = (
        "Every pass of training over the clients' data is counted in the ledger."
        if private
        else "Training on the clients' data carries no guarantee."
    )
    return {
        "training": {"covered": private, "sentence": training},
        "tuning": {
            "covered": False,
            "sentence": "Choosing settings (learning rate, rounds, clipping) by trying several runs on the "
            "same data also reveals something; that is not counted here.",
        },
        "evaluation": {
            "covered": False,
            "sentence": "The scores are computed on the test rows without noise; they carry no guarantee for "
            "these rows.",
        },
        "pretraining": {
            "covered": False,
            "sentence": "Whatever the base model memorised before this run is outside the guarantee.",
        },
    }


def assumptions(
    *, sampling: str, amplified: bool, noise_source: str, noise_description: str, exact_noise: bool = False
) -> list[dict[str, str]]:
    """Return what the accountant takes for granted and whether it held: met, not_met or assumed."""
    if sampling == "poisson":
        drawn = _assumption(
            "sampling", "met", "Units are drawn independently for each step (Poisson sampling), as accounted."
        )
    elif sampling == "scheduled" and not amplified:
        drawn = _assumption(
            "sampling",
            "met",
            "A public schedule says who takes part in which round, and the accountant claims no benefit from sampling.",
        )
    elif amplified:
        drawn = _assumption(
            "sampling",
            "not_met",
            "The accountant counts on Poisson sampling, but batches were shuffled: the stated epsilon is too low.",
        )
    else:
        drawn = _assumption(
            "sampling", "met", "Batches were shuffled, and the accountant claims no benefit from sampling."
        )
    secret = noise_source == "csprng"
    return [
        drawn,
        _assumption(
            "public_sizes",
            "assumed",
            "The number of clients and of rows on each client is treated as public.",
        ),
        _assumption(
            "noise_grid",
            "met",
            f"The noise is drawn as follows: {noise_description.rstrip('.')}; the accountant counts these integers.",
        )
        if exact_noise
        else _assumption(
            "noise_grid",
            "assumed",
            f"The noise is drawn as follows: {noise_description.rstrip('.')}. The accountant treats it as "
            "exactly the distribution named as the mechanism.",
        ),
        _assumption(
            "noise_secret",
            "met" if secret else "not_met",
            "The noise comes from the operating system's secure random numbers, not from the seed."
            if secret
            else f"The noise is not secret. This run is {REPRODUCIBLE}.",
        ),
    ]


def _assumption(name: str, status: str, sentence: str) -> dict[str, str]:
    return {"name": name, "status": status, "sentence": sentence}


def hazards(*, unit: str, largest_epsilon: float | None, private: bool) -> list[dict[str, Any]]:
    """Return the known ways in which a reader can expect too much of the numbers."""
    large = largest_epsilon is not None and largest_epsilon > LARGE_EPSILON
    per_example = unit == "example"
    entries = [
        (
            "large_epsilon",
            large,
            "An epsilon above 8 is large: by itself it promises little, and the protection has to be judged "
            "by attacks as well."
            if large
            else "No epsilon above 8 is claimed.",
        ),
        (
            "unit_below_person",
            per_example and private,
            "One training example is protected, not a person: someone with many examples is protected less "
            "with each of them."
            if per_example
            else "A person is protected as a whole only if all of their data lies with one client.",
        ),
        (
            "unbounded_contribution",
            private,
            "Nothing limits how many examples one person contributed."
            if per_example
            else "Nothing limits how many clients one person owns.",
        ),
        (
            "tuning_on_private_data",
            True,
            "Settings that were tuned on the same data leaked something that no number here contains.",
        ),
        (
            "floating_point",
            private,
            "Gradients are computed and clipped in floating point; the proof speaks of real numbers.",
        ),
        (
            "subgroups",
            True,
            "Clipping and noise cost rare groups most: a good average can hide poor scores for a few.",
        ),
    ]
    return [{"name": name, "applies": applies, "sentence": sentence} for name, applies, sentence in entries]
