"""The report: one file, safe, the same every time, and honest in each kind of run."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from privfed.errors import ConfigError, PrivfedError
from privfed.report.html import write_report
from privfed.report.load import load_run

KINDS = ("local", "central", "none", "reproducible", "unfinished")
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects the text, the text of each ``data-view`` element, all attributes, and checks the nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.views: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    @property
    def visible(self) -> str:
        return " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag not in VOID:
            view = values.get("data-view") or (self.stack[-1][1] if self.stack else None)
            self.stack.append((tag, view))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, view = self.stack[-1] if self.stack else ("", None)
        if tag in ("style", "title"):
            return
        self.words.append(data)
        if view:
            self.views.setdefault(view, []).append(data)


def read(folder: Path) -> tuple[str, Page]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_that_loads_nothing(runs: dict[str, Path], kind: str) -> None:
    text, page = read(runs[kind])
    assert "://" not in text and "<script" not in text and "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "srcset"):
            assert value.startswith("#") or (tag, value) == ("link", "data:,")
    assert len(text) < 1_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_twice(runs: dict[str, Path], kind: str, tmp_path: Path) -> None:
    copy = shutil.copytree(runs[kind], tmp_path / runs[kind].name)
    assert write_report(copy).read_bytes() == (runs[kind] / "report.html").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_accessible(runs: dict[str, Path], kind: str) -> None:
    text, page = read(runs[kind])
    assert '<html lang="en">' in text and "width=device-width" in text
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg") == text.count('<svg role="img" aria-label="') > 0
    targets = {value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")}
    assert targets <= set(page.ids)
    assert text.count("Numbers behind this picture") == text.count("<svg")


def test_private_run_answers_the_three_questions(runs: dict[str, Path]) -> None:
    _, page = read(runs["local"])
    for words in (
        "What was promised?",
        "ε 7.32",
        "changes the odds of anything that can be observed by a factor of at most",
        "1 in 100,000",
        "What did it cost?",
        "4.9 points",
        "ε 7.32 of 8.00",
        "14.4 MB",
        "2 min 3 s",
        "How good is the model?",
        "71.3%",
        "Always the commonest answer 18.7%",
        "Only a simulation can draw this",
        "took longer than its deadline of 30 s",
    ):
        assert words in page.visible, words
    assert set(page.views) == {"individual", "aggregate", "release"}


def test_view_without_guarantee_shows_no_number(runs: dict[str, Path]) -> None:
    _, page = read(runs["central"])
    for view in ("individual", "aggregate"):
        words = "".join(page.views[view])
        assert "no promise" in words and "none" in words
        assert not any(c.isdigit() for c in words), words
    assert "3.20" in "".join(page.views["release"])
    assert "one client" in page.visible and "training example changes" not in page.visible


@pytest.mark.parametrize("kind", ["none", "reproducible"])
def test_run_without_promise_shows_no_epsilon(runs: dict[str, Path], kind: str) -> None:
    text, page = read(runs[kind])
    assert "No privacy guarantee" in page.visible
    assert not re.search(r"(ε|[Ee]psilon)[\s\xa0]*(spent[\s\xa0]*)?\d", page.visible.partition("config.toml")[0])
    assert "7.31" not in page.visible and "7.32" not in page.visible
    assert "Privacy budget spent" not in page.visible
    for words in page.views.values():
        assert not any(c.isdigit() for c in "".join(words))
    assert ('class="banner bad"' in text) is (kind == "reproducible")
    assert ("can be recomputed from its seed" in page.visible) is (kind == "reproducible")


def test_unfinished_run_says_so(runs: dict[str, Path]) -> None:
    text, page = read(runs["unfinished"])
    assert "This run is not finished" in page.visible and "Nothing yet" in page.visible
    assert "spent so far" in page.visible and "No privacy guarantee" not in page.visible
    assert 'id="guarantees"' not in text


def test_empty_run_folder_still_renders(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("seed = 7\n")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "No privacy guarantee" in page.visible


def test_names_are_text_and_never_markup(folders: ModuleType, tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>"
    run = folders.facts(
        run_id=evil,
        data_name=evil,
        noise_description=evil,
        notes=(evil,),
        sentinels={evil: f"failed: {evil}"},
        per_client={evil: 3.0},
    )
    labels = ("<b>bold</b>", "$x_1^$", "數學", '"quoted" & more', "-->")
    folder = folders.write_run(tmp_path / "run", run, first_client=evil, labels=labels)
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in text and "<b>bold" not in text
    assert "<script>alert(" in Page(text).visible
    assert "&lt;script&gt;" in text and "$x_1^$" in text


def test_audited_run_shows_what_was_measured(folders: ModuleType, tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "run", folders.facts())
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["views"]["release"]["empirical_epsilon"] = 1.234
    (folder / "receipt.json").write_text(json.dumps(receipt))
    words = Page(write_report(folder).read_text(encoding="utf-8")).visible
    assert "at least 1.23" in words and "not attacked" in words


def test_stopped_and_poor_run_is_flagged(folders: ModuleType, tmp_path: Path) -> None:
    run = folders.facts(rounds_done=4, beats_probe=False, sentinels={"noise scale": "failed: off by 3 sigma"})
    words = Page(write_report(folders.write_run(tmp_path / "r", run)).read_text(encoding="utf-8")).visible
    for expected in ("stopped early", "does not beat", "did not pass", "off by 3 sigma"):
        assert expected in words


@pytest.mark.parametrize("clients", [1, 5, 40, 41])
def test_partition_picture_of_any_size(folders: ModuleType, tmp_path: Path, clients: int) -> None:
    folder = folders.write_run(tmp_path / "run", folders.facts(), clients=clients)
    text = write_report(folder).read_text(encoding="utf-8")
    assert ("The stronger the colour" in text) is (clients > 40)
    assert f"{clients} clients hold between" in text


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.toml", "a = ["),
        ("receipt.json", "{"),
        ("partition.json", "nonsense"),
        (
            "partition.json",
            '{"label_names": ["a"], "clients": [{"client_id": "c", "size": 1, "label_counts": []}]}',
        ),
        ("metrics.jsonl", "nonsense\n"),
        ("metrics.jsonl", "[]\n"),
        ("metrics.jsonl", '{"kind": "round", "round": "three"}\n'),
    ],
)
def test_garbled_file_is_a_clear_error(folders: ModuleType, tmp_path: Path, name: str, content: str) -> None:
    folder = folders.write_run(tmp_path / "run", folders.facts())
    (folder / name).write_text(content)
    with pytest.raises(PrivfedError, match=re.escape(name)):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_torn_last_line_and_repeated_rounds(folders: ModuleType, tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "run", None, rounds=4)
    path = folder / "metrics.jsonl"
    again = '{"kind":"eval","phase":"train","round":4,"accuracy":0.9}\n{"kind":"later","x":1}\n{"kind":"rou'
    path.write_text(path.read_text() + again)
    metrics = load_run(folder).metrics
    assert metrics.torn and metrics.evals[-1].accuracy == 0.9
    assert [(e.phase, e.round) for e in metrics.evals][:3] == [
        ("warm_start", 0),
        ("warm_start", 1),
        ("train", 1),
    ]
    assert "was cut off" in write_report(folder).read_text(encoding="utf-8")
