import base64
import dataclasses
import gzip
import hashlib
import html.parser
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from photon.errors import PhotonError
from photon.report.charts import Series, Style
from photon.report.write import write_report
from photon.telemetry.events import (
    Diagnostics,
    Evaluated,
    Event,
    RoundFinished,
    RoundStarted,
    RunStarted,
    SiloEvaluation,
    SiloFailed,
    SiloFinished,
)
from photon.telemetry.log import EventLog, read_events
from tests.report.conftest import write_run

VOID = {"meta", "br", "hr", "img", "input", "link", "use", "path", "rect"}


class Page(html.parser.HTMLParser):
    """What a reader gets out of the page: text, headings, tables, and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.pairs: dict[str, list[str]] = {}
        self.label = ""
        self.charts: dict[str, Any] = {}
        self.scripts: list[str] = []
        self.feed(text)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append((self.headings[-1], []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        text = data.strip()
        if "script" in self.open:
            what = [value for tag, _, value in self.attributes if tag == "script"][-2:]
            if what == ["application/json", "charts"]:
                self.charts = json.loads(data)
            elif len(data) < 100_000:
                self.scripts.append(data)
            return
        if not text or "style" in self.open:
            return
        self.words.append(text)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][1][-1][-1] += text
        elif self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(text)
        elif self.open[-1] == "dt":
            self.label = text
            self.pairs[text] = []
        elif self.open[-1] == "dd":
            self.pairs[self.label].append(text)

    def table(self, heading: str) -> list[list[str]]:
        """Return the rows below the head of the one table under a heading."""
        (found,) = [rows for above, rows in self.tables if above == heading]
        return found[1:]

    def columns(self, heading: str) -> list[str]:
        (found,) = [rows for above, rows in self.tables if above == heading]
        return found[0]


@pytest.fixture(scope="module")
def report(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "report.html"
    write_report([finished_run], output)
    return output


@pytest.fixture(scope="module")
def comparison(finished_run: Path, other_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("comparison") / "report.html"
    write_report([finished_run, other_run], output)
    return output


def _page(folders: list[Path], output: Path) -> Page:
    write_report(folders, output)
    return Page(output.read_text())


def test_the_page_holds_the_figures_of_the_run(finished_run: Path, report: Path) -> None:
    page = Page(report.read_text())
    summary = json.loads((finished_run / "summary.json").read_text())
    perplexity = summary["perplexity"]
    assert "quickstart" in page.headings
    assert "finished, 10 rounds" in page.words
    assert page.pairs["Validation perplexity, all silos"] == [
        f"{perplexity['initial']:,.1f} → {perplexity['final']:,.1f}",
        f"the corpus's unigram model: {perplexity['unigram']:,.1f}",
    ]
    assert page.pairs["Tokens trained"][0] == f"{summary['tokens'] / 1000:.0f} k"
    assert page.pairs["Failures"][0] == "1"
    assert page.pairs["SHA-256 of the weights"] == ["ab" * 32]
    silos = {row[0]: row for row in page.table("Validation perplexity by silo")}
    assert silos["legal"][5:] == ["184,320", "2.4%"]
    assert silos["legal"][1] == f"{perplexity['per_silo']['legal']['initial']:,.1f}"
    assert silos["legal"][2] == f"{perplexity['per_silo']['legal']['final']:,.1f}"
    assert silos["overall"][2] == f"{perplexity['final']:,.1f}"


def test_each_figure_has_its_numbers_in_a_table(
    finished_run: Path, report: Path, reread: Callable[[Path], list[Event]]
) -> None:
    page = Page(report.read_text())
    events = reread(finished_run)
    rounds = [event for event in events if isinstance(event, RoundFinished)]
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    by_tokens = page.table("Perplexity against tokens")
    assert [row[-1] for row in by_tokens] == [f"{event.perplexity:,.1f}" for event in evaluations]
    losses = page.table("Training loss")
    assert [row[-1] for row in losses] == [f"{event.train_loss:.4f}" for event in rounds]
    for event in events:
        if isinstance(event, SiloFinished):
            column = 1 + ["cpp", "legal", "prose", "python"].index(event.silo)
            assert losses[event.round - 1][column] == f"{event.loss:.4f}"
    agreement = page.table("Agreement of the silos")
    assert agreement[2] == ["3", f"{rounds[2].silo_cosine:.3f}", f"{rounds[2].consensus:.3f}"]
    times = page.table("Time of each round")
    assert [row[1] for row in times] == [f"{event.seconds['training']:.3f}" for event in rounds]
    assert [sum(map(float, row[1:])) for row in times] == pytest.approx(
        [event.seconds["round"] for event in rounds], abs=0.01
    )
    cohorts = page.table("Cohort of each round")
    (failure,) = [event for event in events if isinstance(event, SiloFailed)]
    assert cohorts[failure.round - 1][2] == failure.silo
    assert failure.reason in page.words
    sent = page.table("Bytes on the link")
    assert sent[-1][1] == f"{(sum(e.bytes_up for e in rounds) + 11 * 8000) / 1e6:.0f} MB"


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_page_needs_nothing_but_itself(name: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(name).read_text()
    page = Page(text)
    (policy,) = [value for tag, _, value in page.attributes if tag == "meta" and "default-src" in value]
    assert "default-src 'none'" in policy
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (packed,) = re.findall(r'id="library">([^<]+)<', text)
    library = gzip.decompress(base64.b64decode(packed))
    other = base64.b64encode(hashlib.sha256(library).digest()).decode()
    assert f"script-src 'sha256-{digest}' 'sha256-{other}'" in policy
    assert policy.count("'unsafe-inline'") == 1, "for styles alone"
    assert b"Bokeh" in library
    assert "@import" not in text
    assert not re.findall(r"https?://[^\s\"'<]+", text)
    links = [value for _, name, value in page.attributes if name in ("href", "xlink:href", "src")]
    assert links == []
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert len(text) < 1_000_000


def test_each_chart_has_the_values_of_the_events(
    finished_run: Path, report: Path, reread: Callable[[Path], list[Event]]
) -> None:
    page = Page(report.read_text())
    events = reread(finished_run)
    rounds = [event for event in events if isinstance(event, RoundFinished)]
    figures = [value for tag, name, value in page.attributes if (tag, name) == ("figure", "id")]
    assert list(page.charts) == figures
    assert len(figures) == 12
    labels = [value for _, name, value in page.attributes if name == "aria-label"]
    assert sum(label.startswith("Plot: ") for label in labels) == 12
    losses = page.charts["training-loss"]
    assert [one["name"] for one in losses["series"]] == ["cpp", "legal", "prose", "python", "cohort"]
    cohort = losses["series"][-1]
    assert cohort["x"] == [event.round for event in rounds]
    assert cohort["y"] == pytest.approx([event.train_loss for event in rounds], rel=1e-5)
    colours = {one["colour"] for chart in page.charts.values() for one in chart["series"]}
    assert colours <= {"ink", "muted", *(f"c{number}" for number in range(1, 7))}, "the page's variables"
    times = page.charts["time-of-each-round"]
    assert (times["kind"], times["y"]["kind"]) == ("bars", "seconds")
    assert times["series"][0]["y"] == pytest.approx([e.seconds["training"] for e in rounds], rel=1e-5)
    grid = page.charts["cohort-of-each-round"]["cells"]
    (failure,) = [event for event in events if isinstance(event, SiloFailed)]
    silo = ["cpp", "legal", "prose", "python"].index(failure.silo)
    assert [
        (row, column) for row, cells in enumerate(grid["failed"]) for column, cell in enumerate(cells) if cell
    ] == [(silo, failure.round - 1)]
    (reference,) = page.charts["perplexity-against-tokens"]["references"]
    assert reference["y"] == pytest.approx(
        [json.loads((finished_run / "summary.json").read_text())["perplexity"]["unigram"]], rel=1e-5
    )
    speeds = page.charts["throughput"]["series"][-1]
    sums = [
        sum(e.tokens for e in events if isinstance(e, SiloFinished) and e.round == r.round) for r in rounds
    ]
    assert speeds["y"] == pytest.approx(
        [tokens / e.seconds["round"] for tokens, e in zip(sums, rounds, strict=True)], rel=1e-5
    )


def test_a_chart_of_many_points_keeps_its_ends() -> None:
    series = Series("many", range(10_000), [math.nan, *range(1, 10_000)], Style.of(30))
    spec = series.spec()
    assert len(spec["x"]) == len(spec["y"]) <= 1_200
    assert (spec["x"][-1], spec["y"][-1]) == (9_999, 9_999)
    assert spec["colour"] == "c1"
    assert spec["dash"] == 1
    assert Series("odd", [1, 2], [math.inf, None], Style.of(0)).spec()["y"] == [None, None]
    assert Series("none", [], [], Style.of(0)).spec()["y"] == []


def test_the_same_run_gives_the_same_page(finished_run: Path, report: Path, tmp_path: Path) -> None:
    write_report([finished_run], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_an_unfinished_run_is_reported_as_far_as_it_came(unfinished_run: Path, tmp_path: Path) -> None:
    page = _page([unfinished_run], tmp_path / "report.html")
    assert "interrupted, 3 of 10 rounds" in page.words
    assert len(page.table("Agreement of the silos")) == 3
    assert "SHA-256 of the weights" not in page.pairs


def test_a_run_that_has_just_begun_is_reported(tmp_path: Path, events: list[Event]) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "config.yaml").write_text("rounds: 10\n")
    for count in (1, 5):
        with EventLog(folder / "events.jsonl") as log:
            for event in events[len(read_events(folder / "events.jsonl")) : count]:
                log(event)
        page = _page([folder], tmp_path / "report.html")
        assert "not finished, 0 of 10 rounds" in page.words


def test_runs_are_laid_side_by_side(finished_run: Path, other_run: Path, comparison: Path) -> None:
    page = Page(comparison.read_text())
    assert page.columns("Settings that differ") == ["run", "rounds", "outer.lr", "strategy._target_"]
    assert page.table("Settings that differ") == [
        ["quickstart", "10", "1.0", "photon.strategy.Photon"],
        ["diloco", "12", "0.7", "photon.strategy.Diloco"],
    ]
    results = {row[0]: row for row in page.table("Results")}
    for folder in (finished_run, other_run):
        summary = json.loads((folder / "summary.json").read_text())
        assert results[folder.name][2] == f"{summary['perplexity']['final']:,.1f}"
        assert results[folder.name][-1] == str(summary["failures"])
    curve = page.table("Perplexity against tokens")
    assert [row[0] for row in curve] == ["quickstart"] * 11 + ["diloco"] * 13


def test_runs_of_one_name_are_told_apart(finished_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sweep" / finished_run.name
    copy.mkdir(parents=True)
    for name in ("config.yaml", "events.jsonl"):
        (copy / name).write_bytes((finished_run / name).read_bytes())
    page = _page([finished_run, copy], tmp_path / "report.html")
    names = [row[0] for row in page.table("Results")]
    assert names == [f"{finished_run.parent.name}/quickstart", "sweep/quickstart"]
    with pytest.raises(PhotonError, match="named twice"):
        write_report([finished_run, finished_run / "."], tmp_path / "report.html")
    command = f"photon report {finished_run} {copy} --output report.html"
    assert command in (tmp_path / "report.html").read_text()
    with pytest.raises(PhotonError, match="sweep: cannot be written"):
        write_report([finished_run], tmp_path / "sweep")


def test_a_resumed_run_shows_each_round_once(tmp_path: Path, events: list[Event]) -> None:
    folder = tmp_path / "resumed"
    folder.mkdir()
    (folder / "config.yaml").write_text("rounds: 10\n")
    index = next(i for i, e in enumerate(events) if isinstance(e, RoundFinished) and e.round == 5)
    lost = [dataclasses.replace(e, train_loss=99.0) if isinstance(e, RoundFinished) else e for e in events]
    started = events[0]
    assert isinstance(started, RunStarted)
    again = next(i for i, e in enumerate(events) if isinstance(e, RoundStarted) and e.round == 4)
    resumed = dataclasses.replace(started, resumed_from=3, time=events[again].time + 1000)
    later = [dataclasses.replace(event, time=event.time + 1000) for event in events[again:]]
    with EventLog(folder / "events.jsonl") as log:
        for event in [*lost[: index + 1], resumed, *later]:
            log(event)
    page = _page([folder], tmp_path / "report.html")
    losses = page.table("Training loss")
    assert [row[0] for row in losses] == [str(number) for number in range(1, 11)]
    assert [row[-1] == "99.0000" for row in losses] == [True] * 3 + [False] * 7
    assert "from round 3" in page.words
    # The pause of a quarter of an hour is no time at work.
    assert page.pairs["Time"][0] == "1:02"


def test_names_are_text_whatever_is_in_them(tmp_path: Path, events: list[Event]) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.yaml").write_text("note: <script>alert(1)</script>\n")
    with EventLog(folder / "events.jsonl") as log:
        for event in events[:40]:
            line = event.to_json().replace("cpp", "<b>$x_1$ & 药").replace("quickstart", "<i>odd</i>")
            log._file.write(line.encode() + b"\n")
    page = _page([folder], tmp_path / "report.html")
    assert "<i>odd</i>" in page.headings
    assert "<b>$x_1$ & 药" in page.words
    assert {"b", "i"}.isdisjoint(tag for tag, _, _ in page.attributes)
    assert len(page.scripts) == 1
    assert page.charts["training-loss"]["series"][0]["name"] == "<b>$x_1$ & 药"


def test_the_centralized_silo_is_in_the_figures(tmp_path: Path, events: list[Event]) -> None:
    folder = tmp_path / "central"
    folder.mkdir()
    (folder / "config.yaml").write_text("rounds: 10\n")
    with EventLog(folder / "events.jsonl") as log:
        for event in events:
            if isinstance(event, RoundStarted):
                log(dataclasses.replace(event, cohort=["centralized"]))
            elif isinstance(event, SiloFinished):
                log(dataclasses.replace(event, silo="centralized"))
            else:
                log(event)
    page = _page([folder], tmp_path / "report.html")
    assert [row[1] for row in page.table("Cohort of each round")] == ["centralized"] * 10
    assert page.columns("Pseudo-gradient norm") == ["round", "centralized", "pseudo-gradient"]


TREE = {"west": {"children": {"deep": {"children": {"x": None}}, "y": None}}, "z": None}


def _node(name: str, perplexity: float) -> dict[str, SiloEvaluation]:
    return {name: {"loss": math.log(perplexity), "perplexity": perplexity, "tokens": 10}}


def _tree_events(
    events: list[Event], tree: dict[str, Any] | None, replies: dict[str, int], values: dict[str, float]
) -> list[Event]:
    """Tell of two rounds, in which silos sent this many bytes up and got ten times as many."""
    started = next(event for event in events if isinstance(event, RunStarted))
    finished = next(event for event in events if isinstance(event, SiloFinished))
    evaluation = next(event for event in events if isinstance(event, Evaluated))
    told: list[Event] = [dataclasses.replace(started, tree=tree, rounds=2)]
    for number in range(3):
        if number:
            told += [
                dataclasses.replace(finished, round=number, silo=name, bytes_up=size, bytes_down=10 * size)
                for name, size in replies.items()
            ]
            told.append(Diagnostics(time=evaluation.time, round=number, values=values))
            closed = next(e for e in events if isinstance(e, RoundFinished))
            told.append(dataclasses.replace(closed, round=number))
        nodes = _node("west", 40.0 - number) | _node("x", 30.0 - number) | _node("z", 20.0 - number)
        told.append(dataclasses.replace(evaluation, round=number, perplexity=90.0 - number, per_node=nodes))
    return told


@pytest.fixture
def tree_run(tmp_path: Path, events: list[Event]) -> Path:
    """Return a run whose federation ``west`` is at hand, but not ``deep`` below it."""
    weights = {
        "attention/3/self": 0.5,
        "attention/3/west": 0.2,
        "attention/3/z": 0.3,
        "attention_entropy/3": 1.0,
    }
    route = {"routed/3/west/deep>z": 0.25, "attention_self/z": 0.75}
    folder = tmp_path / "world"
    write_run(folder, _tree_events(events, TREE, {"west": 1000, "z": 2000}, weights | route))
    values = {"attention/3/self": 0.9, "attention/3/deep": 0.1, "attention_self/down": 0.4}
    below = _tree_events(events, None, {"deep": 300, "y": 400}, values)
    write_run(folder / "silos" / "west", below)
    return folder


def test_a_tree_is_drawn_with_what_its_nodes_and_edges_have(tree_run: Path, tmp_path: Path) -> None:
    page = _page([tree_run], tmp_path / "report.html")
    assert "Tree" in page.headings
    assert page.table("Perplexity and bytes of each node") == [
        ["root", "0", "90.0", "88.0", "–", "–"],
        ["west", "1", "40.0", "38.0", "2.00 kB", "20.0 kB"],
        ["deep", "2", "–", "–", "600 B", "6.00 kB"],
        ["x", "3", "30.0", "28.0", "–", "–"],
        ["y", "2", "–", "–", "800 B", "8.00 kB"],
        ["z", "1", "20.0", "18.0", "4.00 kB", "40.0 kB"],
    ]
    assert any("Where bytes are missing" in words for words in page.words)
    assert page.columns("Own models, level 1") == ["round", "west", "z"]
    assert page.table("Own models, level 1")[1] == ["1", "39.0", "19.0"]
    assert page.table("Own models, level 3")[2] == ["2", "28.0"]
    assert "Own models, level 2" not in page.headings, "nobody knows a perplexity there"
    assert [rows for above, rows in page.tables if above == "Attention in the last round"] == [
        [["of its children", "self", "west", "z"], ["root, block 3", "0.50", "0.20", "0.30"]],
        [["of its children", "self", "deep", "y"], ["west, block 3", "0.90", "0.10", "–"]],
        [["of what comes down", "self", "others"], ["west", "0.40", "0.60"], ["z", "0.75", "0.25"]],
    ]
    shades = [value for tag, name, value in page.attributes if (tag, name) == ("td", "style")]
    assert "background: color-mix(in srgb, var(--c1) 63%, transparent)" in shades, "0.9 of 70 %"
    assert page.table("Routed layers") == [["3", "west/deep", "z", "2", "2", "0.250"]]


def test_a_tree_without_its_federations_shows_what_the_run_itself_has(tree_run: Path, tmp_path: Path) -> None:
    shutil.rmtree(tree_run / "silos")
    page = _page([tree_run], tmp_path / "report.html")
    rows = {row[0]: row for row in page.table("Perplexity and bytes of each node")}
    assert rows["west"][4:] == ["2.00 kB", "20.0 kB"]
    assert rows["deep"][4:] == ["–", "–"]
    assert [rows for above, rows in page.tables if above == "Attention in the last round"][1][1:] == [
        ["z", "0.75", "0.25"]
    ]


def test_events_of_a_federation_that_are_broken_are_named(tree_run: Path, tmp_path: Path) -> None:
    (tree_run / "silos" / "west" / "events.jsonl").write_text("nonsense\n")
    with pytest.raises(PhotonError, match=r"west/events.jsonl.*line 1: not an event"):
        write_report([tree_run], tmp_path / "report.html")


def test_a_run_without_a_tree_has_no_such_section(report: Path) -> None:
    page = Page(report.read_text())
    assert "Tree" not in page.headings
    assert not [value for tag, name, value in page.attributes if (tag, name) == ("td", "style")]


@pytest.mark.parametrize(
    ("missing", "message"),
    [("events.jsonl", "has no events.jsonl"), ("config.yaml", "has no config.yaml")],
)
def test_a_folder_that_is_no_run_is_named(
    finished_run: Path, tmp_path: Path, missing: str, message: str
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "copy")
    (folder / missing).unlink()
    with pytest.raises(PhotonError, match=message) as raised:
        write_report([folder], tmp_path / "report.html")
    assert str(folder) in str(raised.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "a: [1,\nb: 2", "line 2: not YAML"),
        ("config.yaml", "- 1\n", "not a mapping"),
        ("events.jsonl", "nonsense\n", "line 1: not an event"),
        ("events.jsonl", "", "no run_started"),
    ],
)
def test_a_broken_file_is_named(
    finished_run: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "copy")
    (folder / name).write_text(content)
    with pytest.raises(PhotonError, match=message):
        write_report([folder], tmp_path / "report.html")


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="no run is named"):
        write_report([], tmp_path / "report.html")
