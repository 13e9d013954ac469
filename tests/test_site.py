"""The site: it is built strictly, its links lead somewhere, and it fetches nothing from elsewhere."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import click
import pytest
import typer.main
from mkdocs.commands.build import build
from mkdocs.config import load_config

import photon
from photon.commands.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a link that leads nowhere, or a page that is in no menu, ends the build."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


class Links(HTMLParser):
    """What a page leads to, what it loads, and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.leads: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[name] or "" for name in ("id", "name") if name in given}
        target = given.get("href") or given.get("src") or ""
        if tag == "a":
            self.leads.append(target)
        elif target and given.get("rel") != "canonical":
            self.loads.append(target)


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 50
    broken = []
    for page, links in pages.items():
        for target in (*links.leads, *links.loads):
            split = urlsplit(target)
            if split.scheme or not target:
                continue
            file = page.parent / unquote(split.path) if split.path else page
            if file.is_dir():
                file /= "index.html"
            file = file.resolve()
            if not file.is_file() or (
                split.fragment and file in pages and not _has(pages[file], split.fragment)
            ):
                broken.append((page.name, target))
    assert broken == []


def _has(links: Links, fragment: str) -> bool:
    return unquote(fragment) in links.anchors or fragment.startswith("__")


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    loads = {target for page in site.rglob("*.html") for target in Links(page).loads}
    assert loads
    assert [target for target in loads if urlsplit(target).netloc] == []
    # The theme's script would fetch another for these.
    assert [page.name for page in site.rglob("*.html") if 'class="mermaid"' in page.read_text()] == []
    for file in (*site.rglob("*.css"), *site.rglob("*.svg")):
        fetched = re.findall(r"(?:url\(|@import |href=)[\"']?((?:https?:)?//[^\s\"')]+)", file.read_text())
        assert fetched == [], file


def test_documents_lead_to_documents_alone() -> None:
    """A link out of docs/ works on a code host and not on the site."""
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).resolve().is_relative_to(DOCS), f"{page.name}: {target}"


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


def test_the_page_of_the_command_line_has_every_command_and_option(site: Path) -> None:
    page = (site / "cli.html").read_text()
    text = re.sub(r"<[^>]+>", "", page)
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    found = dict(commands(root, "photon"))
    assert len(found) > 25
    for path, command in found.items():
        assert f'id="{path.replace(" ", "-")}"' in page, path
        for parameter in command.params:
            for option in parameter.opts if isinstance(parameter, click.Option) else ():
                assert option in text, f"{path} {option}"


def test_the_page_of_the_interface_has_all_of_it(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text())
    for name in ("prepare", "train", "compare", "Run", *(n for n in vars(photon.Run) if n[0] != "_")):
        assert re.search(rf"\b{name}\b", text), name


def test_figures_of_the_results_in_short_are_on_the_pages_that_they_lead_to() -> None:
    rows = re.findall(
        r"^\| (.+) \| (.+) \| \[.+\]\((.+)\) \|$", (DOCS / "results" / "index.md").read_text(), re.M
    )
    assert len(rows) > 15
    for claim, figure, where in rows:
        text = (DOCS / "results" / where).read_text()
        # Whole numbers below ten are words of the sentence: seeds, silos.
        for number in re.findall(r"\d[\d.,/]*\d", figure):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", text), f"{claim} {number}"


@pytest.fixture
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "scripts" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_terminal_shows_a_run(
    pictures: ModuleType, run_small: Callable[..., object], tmp_path: Path
) -> None:
    run_small("cohort=3", "rounds=2")
    picture = pictures.terminal(tmp_path / "run")
    text = re.sub(r"<[^>]+>", "", picture).replace("&#160;", " ")
    assert "1/2" in text
    assert text.count("✓ done") == 2
    for silo in ("alpha", "beta", "gamma"):
        assert silo in text
    assert "@font-face" not in picture


def test_the_readme_is_short_and_shows_a_run() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    for name in ("terminal.svg", "report.png"):
        assert f"](docs/pictures/{name})" in text
        assert 0 < (DOCS / "pictures" / name).stat().st_size < 300_000
