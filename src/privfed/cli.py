"""The command line: argument handling only; everything else is imported when it is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from privfed.command_line import CONTEXT, Group, Root, json_option, log, run_body, say, set_option, source_argument
from privfed.deployment.commands import COMMANDS

if TYPE_CHECKING:
    from privfed.config import RunConfig
    from privfed.types import View

UNCHECKED = "; its model is not here, or reads its weights to tell: whether the tuning fits it, a run will say"


def _kinds(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return what a shell offers for ``privfed ls``."""
    from privfed.catalogue import KINDS

    return [CompletionItem(name) for name in (*KINDS, "combinations") if name.startswith(incomplete)]


@click.group(cls=Root, context_settings=CONTEXT)
@click.version_option(package_name="privfed")
def main() -> None:
    """Fine-tune one model across clients that keep their data, under a privacy budget.

    Exit codes: 0 ok, 1 failure, 2 usage or configuration, 3 budget exceeded, 4 an audit contradicts a claim.
    """


@main.command()
@source_argument
@set_option
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Run folder. Default: runs/<name>.")
@click.option("--resume", is_flag=True, help="Continue the run in the folder from its last round.")
@click.option("--ledger", "ledger", help="The data holder's ledger. Default: beside the data file.")
@json_option
def train(
    source: str, settings: tuple[str, ...], out: Path | None, resume: bool, ledger: str | None, as_json: bool
) -> None:
    """Train with a privacy budget; leaves adapter, receipt and report in the run folder."""

    def body() -> dict[str, Any]:
        from privfed.config import load_config

        overrides = [*settings, *([f"ledger.path={json.dumps(ledger)}"] if ledger else [])]
        config = load_config(source, overrides)
        from privfed.api import train as run
        from privfed.console import make_progress
        from privfed.report.text import summarise

        folder = out or Path("runs") / Path(source).name.removesuffix(".toml")
        with make_progress() as progress:
            result = run(config, out=folder, resume=resume, progress=progress)
        receipt = result.receipt or {}
        say(as_json, *summarise(receipt, result.path))
        return {"folder": str(result.path), "receipt": receipt}

    run_body(body, as_json)


@main.command()
@click.argument("recipe")
@set_option
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the model; -s model.name.")
@json_option
def pretrain(recipe: str, settings: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Train a small base model on public data, plainly: nothing of it is charged. `privfed ls recipes` names them."""

    def body() -> dict[str, Any]:
        from privfed.pretrain import pretrain as run

        found = run(recipe, settings, out=out, say=log)
        say(as_json, f"Saved to {found['folder']}: use it with -s model.name={found['folder']}")
        return found

    run_body(body, as_json)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--verify", "check", is_flag=True, help="Check receipt, signature and every epsilon, offline.")
@click.option("--key", type=click.Path(path_type=Path), help="With --verify: public key of who should have signed.")
@click.option("--sign", "sign_key", type=click.Path(path_type=Path), metavar="KEYFILE", help="Sign the receipt.")
@click.option("--new-key", is_flag=True, help="With --sign: make the key first, and KEYFILE.pub to give away.")
@json_option
def report(folder: Path, check: bool, key: Path | None, sign_key: Path | None, new_key: bool, as_json: bool) -> None:
    """Write report.html of a run folder: one self-contained page. Or sign its receipt, or check one.

    With --verify the exit code is 1 where something does not fit, and 4 where an epsilon is claimed too small.
    """

    def body() -> dict[str, Any]:
        if (key and not check) or (new_key and not sign_key) or (check and sign_key):
            raise click.UsageError("--key goes with --verify, --new-key with --sign, and --verify not with --sign.")
        if check:
            return _verified(folder, key, as_json)
        from privfed.report.html import write_report

        signer = None
        if sign_key:
            from privfed.report.receipt import read_receipt, write_receipt
            from privfed.report.signing import fingerprint, make_key, signed

            receipt = read_receipt(folder / "receipt.json")
            public = make_key(sign_key) if new_key else None
            write_receipt(folder / "receipt.json", signed(receipt, sign_key))
            signer = fingerprint(read_receipt(folder / "receipt.json"))
            say(as_json, f"Signed by the key {signer}{f'; its public half is {public}' if public else ''}")
        path = write_report(folder)
        say(as_json, str(path))
        return {"report": str(path), "signed_by": signer}

    run_body(body, as_json)


@main.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--attacks", help="Attacks to keep to, separated by commas. Default: all that the run allows.")
@click.option(
    "--view",
    type=click.Choice(["individual", "aggregate", "release"]),
    help="What the adversary sees. Default: all that the run allows.",
)
@click.option(
    "--clients", type=click.IntRange(min=1), default=1, show_default=True, help="Clients to invert one by one."
)
@json_option
def audit(folder: Path, attacks: str | None, view: View | None, clients: int, as_json: bool) -> None:
    """Attack a run and set what is proved against what its receipt claims; exit 4 if a claim is contradicted.

    Train with audit.canaries = N for bounds on epsilon, and with audit.record = true for all views.
    """

    def body() -> dict[str, Any]:
        from privfed_audits.auditing import audit as run
        from privfed_audits.auditing import contradiction, lines

        names = None if attacks is None else [name.strip() for name in attacks.split(",") if name.strip()]
        found = run(folder, attacks=names, view=view, clients=clients, say=log)
        say(as_json, *lines(found))
        sentence = contradiction(found)
        return found if sentence is None else {**found, "ok": False, "exit_code": 4, "message": sentence}

    run_body(body, as_json)


@main.command()
@click.argument("source", metavar="GRID.TOML|PRESET")
@set_option
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the grid. Default: runs/curves-<name>.")
@click.option("--resume", is_flag=True, help="Continue the grid in the folder; what is finished stands.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="Runs at once. Default: what cores and memory allow.")
@click.option("--recommend", metavar="LIMITS", help='The best cells under limits, e.g. "epsilon<=4, bytes<=1MB".')
@json_option
def curves(
    source: str,
    settings: tuple[str, ...],
    out: Path | None,
    resume: bool,
    jobs: int | None,
    recommend: str | None,
    as_json: bool,
) -> None:
    """Train and audit a grid of runs; leaves a page, tables and figures. Presets: quick (minutes), paper (hours)."""

    def body() -> dict[str, Any]:
        from privfed_audits.grids.command import curves as run
        from privfed_audits.grids.command import lines

        folder = out or Path("runs") / f"curves-{Path(source).name.removesuffix('.toml')}"
        found = run(source, out=folder, settings=settings, resume=resume, jobs=jobs, constraints=recommend, say=log)
        say(as_json, *lines(found))
        wrong = "; ".join(found["contradicted"])
        sentence = f"An audit proves more than is promised of {wrong}."
        return {**found, "ok": False, "exit_code": 4, "message": sentence} if wrong else found

    run_body(body, as_json)


@main.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write, new or empty.")
@click.option("--merge", is_flag=True, help="Write the whole model with the adapter merged in, for transformers.")
@json_option
def export(folder: Path, out: Path, merge: bool, as_json: bool) -> None:
    """Write what a run trained: the adapter, or with --merge a whole model."""

    def body() -> dict[str, Any]:
        from privfed.export import export as write
        from privfed.export import lines

        found = write(folder, out, merge=merge)
        say(as_json, *lines(found))
        return found

    run_body(body, as_json)


@main.command()
@source_argument
@set_option
@click.option("--clients", type=click.IntRange(min=1), help="Number of clients, so that no data is read.")
@click.option("--shard-size", type=click.IntRange(min=1), help="Smallest client's examples, so that no data is read.")
@json_option
def budget(source: str, settings: tuple[str, ...], clients: int | None, shard_size: int | None, as_json: bool) -> None:
    """What a run will cost, before it trains.

    Solves for what is missing: with privacy.target_epsilon the noise; with privacy.noise_multiplier the epsilon;
    with both, how many rounds the budget affords.
    """

    def body() -> dict[str, Any]:
        from privfed.budget import answer, lines
        from privfed.config import load_budget_config

        config, both = load_budget_config(source, settings)
        found = answer(config, both=both, clients=clients, shard_size=shard_size)
        say(as_json, *lines(found))
        return found

    run_body(body, as_json)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Check the hash chain; exit 1 if a row was changed or is missing.")
@click.option("--delta", type=float, help="Delta at which epsilon is stated. Default: the run's own, or 1e-5.")
@click.option("--set-cap", type=float, metavar="EPSILON", help="Set the cap for every data set in the ledger.")
@click.option("--unit", type=click.Choice(["example", "client"]), default="example", show_default=True)
@json_option
def ledger(path: Path, verify: bool, delta: float | None, set_cap: float | None, unit: str, as_json: bool) -> None:
    """List and sum what was spent; PATH is a ledger or a run folder."""

    def body() -> dict[str, Any]:
        from privfed.ledger_view import lines, overview

        found = overview(path, verify=verify, delta=delta, set_cap=set_cap, unit=unit)
        say(as_json, *lines(found))
        return found

    run_body(body, as_json)


@main.command("ls")
@click.argument("kind", required=False, shell_complete=_kinds)
@click.option("--only", multiple=True, metavar="AXIS=VALUE", help="Of combinations: keep these, e.g. --only rule=krum.")
@click.option("--refused", is_flag=True, help="Of combinations: say why, and what is nearest that runs.")
@json_option
def ls(kind: str | None, only: tuple[str, ...], refused: bool, as_json: bool) -> None:
    """List tunings, codecs, mechanisms, models, data, attacks or presets; or which combinations of them run.

    The axes of `privfed ls combinations` are tuning, codec, privacy, rule and secagg.
    """

    def body() -> dict[str, Any]:
        if kind == "combinations":
            from privfed.combinations import text

            matrix = text.selected(only)
            if as_json:
                return text.record(matrix)
            say(as_json, *text.lines(matrix, refused=refused))
            return {}
        if only or refused:
            raise click.UsageError("--only and --refused belong to `privfed ls combinations`.")
        from privfed.catalogue import catalogue, lines

        found = {} if kind == "attacks" else catalogue(kind)
        if kind in (None, "attacks"):
            from privfed_audits.listing import attacks

            found = {**found, "attacks": attacks()}
        say(as_json, *lines(found))
        return found

    run_body(body, as_json)


@main.group(cls=Group)
def config() -> None:
    """Show, validate and compare configurations."""


@config.command("show")
@source_argument
@set_option
@click.option("--cost", is_flag=True, help="Print what a round of secure aggregation costs instead.")
@click.option("--length", type=click.IntRange(min=0), help="Trained values, so that --cost loads no model.")
@json_option
def config_show(source: str, settings: tuple[str, ...], cost: bool, length: int | None, as_json: bool) -> None:
    """Print the resolved configuration, every default included; with --cost what its masked sums cost."""

    def body() -> dict[str, Any]:
        from privfed.config import load_config
        from privfed.tuning import check

        found = load_config(source, settings)
        check(found.tuning, found.model.task)
        if cost:
            from privfed.federation.cost import run_cost

            costs = run_cost(found, length=length)
            say(as_json, *costs.pop("lines"))
            return costs
        say(as_json, found.to_toml().rstrip())
        return found.to_dict()

    run_body(body, as_json)


@config.command("validate")
@source_argument
@set_option
@json_option
def config_validate(source: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Exit 0 if the configuration can hold, 2 with the reason if not."""

    def body() -> dict[str, Any]:
        from privfed.config import load_config
        from privfed.tuning import check

        found = load_config(source, settings)
        check(found.tuning, found.model.task)
        fits = _fits(found)
        say(as_json, f"{source} is valid (digest {found.digest()[:12]}){'' if fits else UNCHECKED}")
        return {"valid": True, "digest": found.digest(), "model_checked": fits}

    run_body(body, as_json)


@config.command("diff")
@click.argument("left")
@click.argument("right")
@json_option
def config_diff(left: str, right: str, as_json: bool) -> None:
    """Print the keys in which two configurations (files, presets) differ."""

    def body() -> dict[str, Any]:
        from privfed.config import differences, load_config

        found = differences(load_config(left), load_config(right))
        say(as_json, *(found or ["no difference"]))
        return {"differences": found}

    run_body(body, as_json)


def _verified(folder: Path, key: Path | None, as_json: bool) -> dict[str, Any]:
    """Return what a check of a receipt found."""
    from privfed.report.verify import verify

    found = verify(folder, key=key)
    say(as_json, *(found.mismatches or [f"Verified: {', '.join(found.checked)}."]))
    for view, value in found.epsilon.items():
        say(as_json, f"{view}: epsilon {value:.6g}")
    if found.signed_by and key is None:
        say(as_json, f"Signed by the key {found.signed_by}; whose that is, --key would tell.")
    return {
        "ok": not found.mismatches,
        "exit_code": found.exit_code,
        "mismatches": list(found.mismatches),
        "epsilon": dict(found.epsilon),
        "signed_by": found.signed_by,
        "checked": list(found.checked),
    }


def _fits(config: RunConfig) -> bool:
    """Ask the model's shape whether tuning and rule fit it; return False where the model is not here to ask."""
    from privfed.errors import ModelError
    from privfed.models import resolve

    try:
        here = resolve(config.model).local
    except ModelError:
        here = False
    if not here:
        return False
    from privfed.federation.structure import check_structure
    from privfed.models.loading import check_conversations

    if config.data.messages is not None:
        check_conversations(config.model)
    return check_structure(config)


for _command in COMMANDS:
    main.add_command(_command)

if __name__ == "__main__":
    main()
