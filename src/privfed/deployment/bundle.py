"""The app bundle of Flower: two lines of code that point at the installed privfed, the same bytes on every machine.

A site that pins its digest (``accept.bundles``) answers for this bundle only; it never runs what is in one.
"""

from __future__ import annotations

from pathlib import Path

from privfed import __version__

NAME = "privfed-app"
_FILES = {
    "pyproject.toml": f"""\
[project]
name = "{NAME}"
version = "{__version__}"
description = "Points Flower at the installed privfed."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "privfed"

[tool.flwr.app.components]
serverapp = "privfed_app.server:app"
clientapp = "privfed_app.client:app"

[tool.flwr.app.config]
config = "run.toml"
roster = "roster.toml"
out = "runs/flower"
state = ""
resume = false
stage-seconds = 60.0
opening-seconds = 900.0
patience-seconds = 900.0
""",
    "privfed_app/__init__.py": '"""The installed privfed does the work."""\n',
    "privfed_app/server.py": "from privfed.deployment import server_app\n\napp = server_app.app\n",
    "privfed_app/client.py": "from privfed.federation.engines.flower import client_app\n\napp = client_app.app\n",
}


def write_bundle(folder: Path) -> str:
    """Write the app's folder for ``flwr run``; return the SHA-256 of the bundle that Flower makes of it."""
    import hashlib

    from flwr.cli.build import build_fab_from_disk

    app = folder / NAME
    for name, content in _FILES.items():
        path = app / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return hashlib.sha256(build_fab_from_disk(app)).hexdigest()
