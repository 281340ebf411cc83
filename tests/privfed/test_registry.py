"""The registry: duplicates fail, unknown names suggest, every plug-in is one file that registers itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from privfed.compression import CODECS
from privfed.data import PARTITIONERS, SOURCES
from privfed.errors import UnknownNameError
from privfed.models import MODELS
from privfed.registry import Registry
from privfed.tuning import TUNINGS
from privfed.tuning.peft_methods import METHODS

REGISTRIES = {"tuning": TUNINGS, "codec": CODECS, "partitioner": PARTITIONERS, "source": SOURCES, "model": MODELS}
ROOT = Path(__file__).parents[2] / "src"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a registry over a package of two plug-ins on disk."""
    folder = tmp_path / "some_plugins"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from privfed.registry import Registry\nTHINGS = Registry('thing', 'some_plugins')\nCOUNT = []\n"
    )
    for name in ("square", "circle"):
        (folder / f"{name}.py").write_text(
            "from some_plugins import COUNT, THINGS\nCOUNT.append(1)\n\n"
            f"@THINGS.register('{name}')\ndef f(): return '{name}'\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    import some_plugins

    yield some_plugins
    for name in [n for n in sys.modules if n.startswith("some_plugins")]:
        del sys.modules[name]


def test_modules_are_imported_once_on_the_first_look_up(package):
    assert package.COUNT == []
    assert package.THINGS.names() == ["circle", "square"]
    assert package.THINGS.get("square")() == "square"
    assert [name for name, _ in package.THINGS.items()] == ["circle", "square"]
    assert len(package.COUNT) == 2


def test_a_name_can_be_taken_once(package):
    with pytest.raises(ValueError, match="thing 'circle' is registered twice"):
        package.THINGS.names() and package.THINGS.register("circle")(None)


def test_an_unknown_name_suggests_the_nearest_and_lists_all(package):
    with pytest.raises(UnknownNameError) as caught:
        package.THINGS.get("sqare")
    assert str(caught.value) == "Unknown thing 'sqare'. Did you mean 'square'? Known: circle, square."
    with pytest.raises(UnknownNameError, match=r"Unknown thing 'zzz'. Known: circle, square\."):
        package.THINGS.get("zzz")


def test_a_plug_in_that_cannot_be_imported_is_not_hidden(package, tmp_path):
    (tmp_path / "some_plugins" / "broken.py").write_text("raise RuntimeError('broken plug-in')")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken plug-in"):
            package.THINGS.names()


# files that register several names
SHARED_FILES = {"peft_methods": set(METHODS), "lora_variants": {"dora", "pissa", "rslora"}}
# keys without a default
NEEDED = {"select": {"select": "value"}}


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_file_that_registers_is_found_under_its_own_name(kind):
    registry = REGISTRIES[kind]
    folder = ROOT.joinpath(*registry.package.split("."))
    files = {path.stem for path in folder.glob("*.py") if re.search(r"\.register\(\"", path.read_text())}
    shared = SHARED_FILES if kind == "tuning" else {}
    assert (files - set(shared)).union(*shared.values()) == set(registry.names()) != set()


@pytest.mark.parametrize("kind", ["tuning", "codec", "partitioner"])
def test_every_table_carries_its_own_name_and_all_defaults(kind):
    for name, plugin in REGISTRIES[kind].items():
        assert plugin.config(**NEEDED.get(name, {})).name == name
        # peft's own options are compared with peft's own classes, by the tuning's check
        assert plugin.config.model_config["extra"] == ("allow" if name in METHODS else "forbid")
        assert (plugin.check is not None) if name in METHODS else True
        assert plugin.config.__doc__


def test_a_registry_is_its_own():
    assert Registry("x", "privfed.tuning")._entries is not TUNINGS._entries
