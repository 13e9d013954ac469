"""A hook of mkdocs: the page of the command line is written from the commands, whenever the site is built."""

from collections.abc import Iterator

import click
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from photon.commands.app import app

PAGE = "cli.md"
HEAD = """# Command line

Written from the commands themselves: what `photon COMMAND --help` says. Each takes `-h` and `--help`.
`photon --install-completion` lets the shell complete them.
"""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the page, as if it lay in the folder of the others."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """Return every command with its help, arguments and options."""
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    return "\n".join([HEAD, *_commands(root, "photon", 2)])


def _commands(group: click.Group, path: str, level: int) -> Iterator[str]:
    for name, command in group.commands.items():
        yield from _section(command, f"{path} {name}", level)
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}", level + 1)


def _section(command: click.Command, path: str, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=path)
    yield f"{'#' * level} {path}\n"
    # Docstrings mark where a terminal keeps lines as they are.
    yield (command.help or "").replace("\b", "").replace("• ", "* ").strip() + "\n"
    yield f"```text\n{path} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    rows = [record for parameter in command.params if (record := _record(parameter, context)) is not None]
    if rows:
        yield "| | |\n|---|---|"
        yield from (f"| {_cell(name)} | {_prose(told)} |" for name, told in rows)
        yield ""


def _record(parameter: click.Parameter, context: click.Context) -> tuple[str, str] | None:
    if isinstance(parameter, click.Option):
        return parameter.get_help_record(context)
    return parameter.make_metavar(context), getattr(parameter, "help", None) or ""


def _cell(text: str) -> str:
    return f"`{text}`".replace("|", r"\|")


def _prose(text: str) -> str:
    """Return a help's text so that no character of it means anything to Markdown but what it says."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;").replace("[", r"\[")
