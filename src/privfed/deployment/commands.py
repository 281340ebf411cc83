"""The commands `privfed serve` and `privfed join`: arguments only. The command line adds them to its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from privfed.command_line import json_option, log, run_body, set_option

FILE = click.Path(path_type=Path)


@click.command("serve")
@click.argument("source", metavar="RUN.TOML|PRESET")
@set_option
@click.option("--roster", type=FILE, default=Path("roster.toml"), show_default=True, help="The sites' cards.")
@click.option("-o", "--out", type=FILE, help="Run folder. Default: runs/<name>.")
@click.option("--state", type=FILE, help="Certificates, logs, Flower's files. Default: beside the run folder.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", default=9092, show_default=True, type=click.IntRange(1, 65535))
@click.option("--name", "names", multiple=True, help="A name or address for the lab's certificate; repeatable.")
@click.option("--ca", type=FILE, help="The operator's own authority; with --certificate and --key.")
@click.option("--certificate", type=FILE, help="The server's certificate.")
@click.option("--key", type=FILE, help="The server's private key.")
@click.option("--insecure", is_flag=True, help="No TLS, no node authentication: for tests on one machine.")
@click.option("--resume", is_flag=True, help="Continue the run in the folder from its last round.")
@click.option("--stage-seconds", default=60.0, show_default=True, type=click.FloatRange(min=1))
@click.option("--opening-seconds", default=900.0, show_default=True, type=click.FloatRange(min=1))
@click.option("--patience-seconds", default=900.0, show_default=True, type=click.FloatRange(min=1))
@click.option("--bundle", type=FILE, help="Write the app and its run.toml for `flwr run` here, and stop.")
@json_option
def serve(source: str, settings: tuple[str, ...], as_json: bool, bundle: Path | None, **given: Any) -> None:
    """Train with clients at sites: start a SuperLink, let the roster's sites in, run, stop."""

    def body() -> Mapping[str, Any]:
        from privfed.deployment.certificates import ServerFiles
        from privfed.deployment.serve import ServeOptions, serve, write_app
        from privfed.errors import ConfigError

        if bundle is not None:
            return write_app(bundle, source, settings, given["roster"], log)
        own = [given.pop(name) for name in ("ca", "certificate", "key")]
        if any(own) and not all(own):
            raise ConfigError("Give --ca, --certificate and --key together, or none of them for a lab's.")
        out = given.pop("out") or Path("runs") / Path(source).name.removesuffix(".toml")
        state = given.pop("state") or out.with_name(f"{out.name}-server")
        names = ("stage_seconds", "opening_seconds", "patience_seconds")
        options = ServeOptions(
            source=source,
            settings=settings,
            out=out,
            state=state,
            files=ServerFiles(authority=own[0], certificate=own[1], key=own[2]) if all(own) else None,
            seconds={name.replace("_", "-"): given.pop(name) for name in names},
            **given,
        )
        return serve(options, log)

    run_body(body, as_json)


@click.command("join")
@click.argument("site", metavar="SITE.TOML", type=FILE)
@click.option("--card", "source", metavar="RUN.TOML|PRESET", help="Write the site's card for a run, and stop.")
@click.option("-o", "--out", type=FILE, help="Where the card goes. Default: <name>.card.toml.")
@click.option("--socket", type=FILE, help="Answer a SuperNode of your own at this Unix socket; start none.")
@set_option
@json_option
def join(
    site: Path,
    source: str | None,
    out: Path | None,
    socket: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Take part with one's own data: start a SuperNode and answer the server as SITE.TOML allows."""

    def body() -> Mapping[str, Any]:
        from privfed.deployment import join as joining
        from privfed.deployment.site_config import read_site

        config = read_site(site)
        if source is not None:
            path = out or Path(f"{config.name}.card.toml")
            path.write_text(joining.card_of(config, source, settings, log), encoding="utf-8")
            log(f"Card: {path}. Send it to the operator by a way that you trust; all cards make the roster.")
            return {"card": str(path)}
        return joining.join_at_socket(config, socket, log) if socket else joining.join(config, log)

    run_body(body, as_json)


COMMANDS = (serve, join)
