"""What people type wrong: each message says what was given, what was expected and what to do; none is a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from privfed.cli import main

BASE = """
[data]
path = "rows.csv"
[partition]
name = "iid"
clients = 4
[client]
batch_size = 4
[server]
rounds = 2
[secagg]
name = "none"
[privacy]
target_epsilon = 8.0
accountant = "rdp"
"""
WORDS = ("cat", "dog", "sun", "sky", "tea", "pen")

# (what was typed, what the message has to say)
WRONG = [
    # commands and options
    ("trian tiny", ["No such command 'trian'", "Did you mean 'train'?"]),
    ("train", ["Missing argument 'RUN.TOML|PRESET'"]),
    ("train tiny --round 3", ["No such option '--round'"]),
    ("budget base.toml --clients many", ["'many' is not a valid integer"]),
    ("ls codec", ["Unknown kind 'codec'", "Did you mean 'codecs'?"]),
    # where the configuration comes from
    ("train nowhere.toml", ["There is no file 'nowhere.toml'", "one of the presets", "tiny"]),
    ("train tinny", ["Unknown preset 'tinny'", "Did you mean 'tiny'?"]),
    ("train torn.toml", ["torn.toml is not valid TOML", "line 2"]),
    ("train rows.csv", ["rows.csv is not valid TOML", "Rows of data are no configuration", "data.path"]),
    # keys and values
    ("train base.toml -s privacy.target_epsilom=3", ["Unknown key 'privacy.target_epsilom'", "'target_epsilon'?"]),
    ("train base.toml -s server.rounds", ["-s server.rounds: expected key=value, such as -s tuning.r=16"]),
    ("train base.toml -s server=3", ["server = 3, expected a table of keys: write [server]", "-s server.KEY=VALUE"]),
    (
        "train base.toml -s server.rounds=many",
        ["server.rounds = 'many', expected a valid integer, such as 3", "default"],
    ),
    ("train base.toml -s server.rounds=0", ["server.rounds = 0, expected a value greater than or equal to 1"]),
    ("train base.toml -s client.learning_rate=0,1", ["'0,1', expected a valid number, such as 0.5 with a point"]),
    ("train base.toml -s model.device=gpu", ["model.device = 'gpu', expected 'auto', 'cpu', 'cuda' or 'mps'"]),
    ("train base.toml -s data.text=7", ["data.text = 7, expected a valid string: put it in quotes"]),
    ("train base.toml -s tuning.name=lorra", ["Unknown tuning 'lorra'", "Did you mean 'lora'?"]),
    # what cannot hold together
    ("train base.toml -s privacy.noise_multiplier=1", ["are both given, expected exactly one", "unset"]),
    ("train base.toml -s privacy.target_epsilon=-1", ["target_epsilon is -1.0, expected a number above 0", "unit"]),
    (
        "train base.toml -s secagg.name=masked -s server.aggregation=krum",
        ["krum", "sum only", 'use secagg.name = "none"'],
    ),
    # data
    ("budget base.toml -s data.path=rowz.csv", ["'rowz.csv' is not there", "Did you mean 'rows.csv'?", "relative"]),
    ("budget base.toml -s data.path=sheet.xlsx", ["'.xlsx', expected .csv", "convert or rename it"]),
    ("budget base.toml -s data.path=latin.csv", ["byte 0xe9", "(line 2), expected UTF-8", "iconv"]),
    (
        "budget base.toml -s data.path=semicolons.csv",
        ["separates its values by ';' (text;label)", "save it with commas"],
    ),
    ("budget base.toml -s data.path=tabs.csv", ["separates its values by", "or with tabs as .tsv"]),
    ("budget base.toml -s data.text=txet", ["no column 'txet', only 'text', 'label'", "Set [data] text"]),
    (
        "budget base.toml -s data.path=same.csv",
        ["the label 'same', expected two classes or more", "check [data] label"],
    ),
    ("budget base.toml -s server.cohort_size=9", ["cohort_size = 9, but the partition has 4 clients", "lower it"]),
    ("budget base.toml -s client.batch_size=500", ["larger than the shard of client-", "lower it"]),
    ("budget base.toml -s data.name=object:0123456789abcdef", ["that Python code handed over", "or set [data] path"]),
    # models
    (
        "train base.toml -s model.name=object:0123456789abcdef",
        ["that Python code handed over", "model.name to a folder"],
    ),
    ("train base.toml -s model.name=./nothing", ["no model folder './nothing'", "config.json and *.safetensors"]),
    ("train base.toml -s model.name=pickles", ["no *.safetensors", "convert them with save_pretrained"]),
    # folders
    ("train base.toml -o rows.csv", ["rows.csv is a file: pass a folder for the run with -o"]),
    ("train base.toml -o pickles", ["is not empty and holds no run", "pass an empty or new folder"]),
    ("train base.toml -o fresh --resume", ["There is no run to resume in fresh", "leave --resume out"]),
    ("report pickles", ["pickles is not a run folder: it has no config.toml", "Give the folder"]),
    ("export pickles -o out", ["There is no run in pickles", "pass a folder"]),
    ("audit pickles", ["There is no run in pickles", "pass a folder that `privfed train` wrote"]),
    ("ledger nope", ["nope", "no ledger"]),
    ("ledger rows.csv", ["rows.csv", "not a"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound configuration, its rows, and things that people take for one or the other."""
    found = tmp_path_factory.mktemp("wrong")
    rows = "".join(f"{word} words of row {i},{i % 3}\n" for i, word in enumerate(WORDS * 10))
    (found / "base.toml").write_text(BASE)
    (found / "rows.csv").write_text("text,label\n" + rows)
    (found / "semicolons.csv").write_text('text;label\n"a; b";1\n')
    (found / "tabs.csv").write_text("text\tlabel\na\t1\n")
    (found / "same.csv").write_text("text,label\n" + re.sub(r",\d$", ",same", rows, flags=re.MULTILINE))
    (found / "latin.csv").write_bytes("text,label\ncafé,1\nthe,0\n".encode("latin1"))
    (found / "sheet.xlsx").write_bytes(b"PK\x03\x04")
    (found / "torn.toml").write_text("seed = 1\n[data\n")
    (found / "pickles").mkdir()
    (found / "pickles" / "config.json").write_text("{}")
    (found / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    return found


@pytest.mark.parametrize(("typed", "expected"), WRONG, ids=[typed for typed, _ in WRONG])
def test_a_wrong_input_ends_with_a_sentence_that_helps(
    typed: str, expected: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(main, typed.split())
    assert isinstance(done.exception, SystemExit), done.exception
    assert (done.exit_code, done.stdout) == (1 if typed == "ledger rows.csv" else 2, "")
    for part in expected:
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(folder.rglob("*")) == before  # nothing half made is left


def test_data_sets_of_the_hub_ask_for_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from privfed.data import hub
    from privfed.data.config import DataConfig
    from privfed.errors import DataError

    with monkeypatch.context() as patched:
        patched.setattr(hub.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DataError, match=r"Did you mean 'pydoc'\?.*pip install 'privfed\[hub\]'"):
            hub.download(DataConfig(name="pydok"), ("pydoc",))


def test_there_are_twenty_of_them_and_the_sound_one_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert len({tuple(parts) for _, parts in WRONG}) >= 20
    started = time.process_time()
    done = CliRunner().invoke(main, ["budget", "base.toml", "--clients", "4", "--shard-size", "12"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert time.process_time() - started < 60


@pytest.mark.parametrize(
    ("shell", "script"),
    [("bash", "complete -o nosort -F"), ("zsh", "#compdef privfed"), ("fish", "complete --no-files")],
)
def test_every_shell_has_its_completion(shell: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    completion = kind(main, {}, "privfed", "_PRIVFED_COMPLETE")
    assert script in completion.source_template % completion.source_vars()


def completed(*words: str) -> set[str]:
    """Return what a shell is offered after these words."""
    from click.shell_completion import ShellComplete

    offered = ShellComplete(main, {}, "privfed", "_PRIVFED_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return {item.value for item in offered}


def test_a_shell_gets_its_answer_from_the_program() -> None:
    code = "import sys; sys.argv = ['privfed']; from privfed.cli import main; main()"
    env = {**os.environ, "_PRIVFED_COMPLETE": "bash_complete", "COMP_WORDS": "privfed tr", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,train\n", "")


def test_commands_options_presets_and_files_are_completed() -> None:
    assert {"train", "budget", "ledger", "export"} <= completed("")
    assert completed("tr") == {"train"}
    assert {"show", "validate", "diff"} <= completed("config", "")
    assert {"--resume", "--out", "--json"} <= completed("train", "--")
    assert "tiny" in completed("train", "ti") and "demo" in completed("budget", "")
    assert {"codecs", "tunings"} <= completed("ls", "")
