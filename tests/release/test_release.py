"""What is published: wheel and source archive, and the wheel alone in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (wheel, source archive) as `make dist` builds them."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages_typed_with_all_their_files(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    packages = {"privfed": "src", "privfed_attacks": "attacks", "privfed_audits": "audits"}
    for package, place in packages.items():
        assert f"{package}/py.typed" in names
        here = {
            str(path.relative_to(ROOT / place))
            for path in (ROOT / place / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert here and here <= set(names), here - set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {*packages}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_source_archive_can_be_built_from_and_names_no_workplace(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "Makefile", "SECURITY.md"} <= names
    assert not [name for name in names if name.startswith((".ci", "runs/", ".venv"))]


@pytest.mark.slow
def test_twine_finds_nothing_to_complain_of(built: tuple[Path, Path]) -> None:
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


@pytest.mark.slow
def test_the_extras_say_what_they_bring(built: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(built[0])
    metadata = message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))))
    extras = set(metadata.get_all("Provides-Extra") or ())
    assert {"demo", "hub", "tensorboard", "mlflow", "generation", "quantization"} <= extras
    always = [line for line in metadata.get_all("Requires-Dist") or () if "extra ==" not in line]
    assert not [line for line in always if line.startswith(("datasets", "tensorboard", "mlflow"))]


@pytest.mark.slow
def test_the_wheel_alone_runs_in_an_environment_of_its_own(built: tuple[Path, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    site = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, str(built[0]))
    # the dependencies of this environment stand in for a download; what is privfed comes from the wheel
    (site / "zz_dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), *_site_packages()}))
    where = run(
        str(python), "-c", "import privfed, privfed_attacks, privfed_audits as a; print(privfed.__file__, a.__file__)"
    )
    assert all(Path(path).is_relative_to(site) for path in where.split())
    assert "Fine-tune one model across clients" in run(str(scripts / "privfed"), "--help")
    assert "digest" in run(str(scripts / "privfed"), "config", "validate", "tiny", "-s", "model.name=not/here")
    assert "ffa_lora" in run(str(scripts / "privfed"), "ls", "tunings")


def _site_packages() -> list[str]:
    return [path for path in sys.path if path.endswith("site-packages")]


def test_the_page_of_versions_says_what_the_metadata_allow_and_what_is_pinned() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("lowest", Path(__file__).with_name("lowest.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.lowest()
    assert set(found) == {"torch", "transformers", "peft"}
    page = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name, version in found.items():
        assert f"| {name} | {version} | {pinned[name]} |" in page
