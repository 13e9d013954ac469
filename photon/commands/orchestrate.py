"""``photon orchestrate``: several models answer together."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from typer.core import TyperGroup

from photon.errors import PhotonError, RunError, printable

if TYPE_CHECKING:
    from photon.endpoints.client import Tally
    from photon.orchestration.asked import AskedWorld
    from photon.orchestration.method import TrainingSection
    from photon.orchestration.policy import Policy
    from photon.orchestration.reinforce import Update


class RunsByDefault(TyperGroup):
    """Takes what is no command of it for the arguments of ``run``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``run`` before arguments that begin with no command."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


orchestrate = typer.Typer(
    name="orchestrate",
    cls=RunsByDefault,
    help="Let several models answer together: `photon orchestrate QUESTIONS --agents FILE --policy POLICY`, "
    "as of `run`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_Agents = Annotated[Path, typer.Option(metavar="FILE", help="Agents: endpoints, models, settings (YAML).")]
_Method = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Settings of the method (YAML); default: see the page.")
]
_Cache = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Answers that are not asked for again; default: beside the output."),
]
_Concurrency = Annotated[int, typer.Option(min=1, max=1024, help="Requests at the same time.")]


@orchestrate.command()
def run(
    questions: Annotated[Path, typer.Argument(help="Questions: JSON Lines.")],
    agents: _Agents,
    policy: Annotated[
        str,
        typer.Option(help="parallel, self-consistency, selforg, full, rule, or nexa:FILE of a trained one."),
    ],
    method: _Method = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the answers; default: orchestrated/QUESTIONS-POLICY."),
    ] = None,
    cache: _Cache = None,
    concurrency: _Concurrency = 8,
) -> None:
    """Answer questions with several models; a second start asks what is missing alone."""
    from photon.endpoints.agent import read_agents
    from photon.endpoints.client import Client
    from photon.orchestration.answer import Orchestra
    from photon.orchestration.encoder import encoder_of
    from photon.orchestration.method import read_method
    from photon.orchestration.questions import read_questions
    from photon.orchestration.run import answer_all, folder_of, settings_of
    from photon.orchestration.who import NEXA, who_of

    if method is not None and policy.startswith(NEXA):
        raise PhotonError("--method: a trained policy has its own settings; leave it out")
    who = who_of(policy, read_method(method))
    asked, players = read_questions(questions), read_agents(agents)
    encode = encoder_of(who.method.encoder)
    who.check_size(encode.size)
    folder = output or Path("orchestrated") / f"{questions.stem}-{_file_name(policy)}"
    settings = settings_of(asked, players, who)
    with (
        folder_of(folder, settings) as lines,
        Client(cache or folder.parent / "replies", concurrency=concurrency) as client,
    ):
        client.check(players)
        there = {line.id for line in lines}
        missing = [one for one in asked if one.id not in there]
        with _progress("answering", len(missing)) as advance:
            failed = answer_all(missing, Orchestra(client, players, encode, who.method), who, folder, advance)
        _finish(folder, policy, len(players), failed, client.tally)
    if failed:
        raise RunError(
            f"{failed.total()} of {len(asked)} questions have no answer ({_counts(failed)}); the same "
            "command asks for these alone"
        )


def _file_name(policy: str) -> str:
    kind, _, file = policy.partition(":")
    return f"{kind}-{Path(file).stem}" if file else kind


def _finish(folder: Path, policy: str, agents: int, failed: "Counter[str]", tally: "Tally") -> None:
    """Write and print the figures of all that has been answered."""
    from photon.orchestration.figures import summary, told
    from photon.orchestration.run import read_answers, write_summary

    figures = summary(read_answers(folder), agents)
    figures["policy"], figures["failed_questions"] = policy, dict(failed)
    figures["last_start"] = {"requests": tally.requests, "cached": tally.cached, "faults": dict(tally.faults)}
    write_summary(folder, figures)
    for name, value in told(policy, figures):
        typer.echo(f"{name + ':':26}{value}")
    faults = f"; faults: {_counts(tally.faults)}" if tally.faults else ""
    typer.echo(f"{'this start:':26}{tally.requests:,} requests, {tally.cached:,} from the cache{faults}")
    typer.echo(f"{'written:':26}{folder}")


def _counts(found: "Counter[str]") -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(found.items()))


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told how many are done and failed: a bar on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        step = max(1, -(-total // 10))

        def line(done: int, failed: int) -> None:
            if (done + failed) % step == 0 or done + failed == total:
                beside = f", {failed:,} failed" if failed else ""
                typer.echo(f"{what}: {done:,} of {total:,}{beside}", err=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)

        def move(done: int, failed: int) -> None:
            beside = f" ({failed:,} failed)" if failed else ""
            bar.update(task, completed=done + failed, description=f"{what}{beside}")

        yield move


@orchestrate.command()
def train(
    questions: Annotated[
        list[Path],
        typer.Argument(help="Questions with their answers: JSON Lines. Of several files each is a silo."),
    ],
    agents: _Agents,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The policy, a safetensors file.")],
    method: _Method = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of a federation of silos; default: 20 with several.")
    ] = None,
    cache: _Cache = None,
    concurrency: _Concurrency = 8,
) -> None:
    """Train a policy on questions whose answers are known, by REINFORCE.

    What agents have answered is kept, so a second start takes the same updates and asks for nothing twice.
    """
    from photon.endpoints.agent import read_agents
    from photon.endpoints.client import Client
    from photon.orchestration.answer import Orchestra
    from photon.orchestration.asked import AskedWorld
    from photon.orchestration.encoder import encoder_of
    from photon.orchestration.method import read_method
    from photon.orchestration.policy import Policy, save_policy
    from photon.orchestration.questions import read_questions

    _check_file(output)
    settings, players = read_method(method), read_agents(agents)
    if len(players) < 2:
        raise PhotonError(f"agents {agents}: one agent has nobody to read; give it more, or copies")
    files = {file.stem: read_questions(file) for file in questions}
    if len(files) < len(questions):
        raise PhotonError("two files of questions have the same name; silos are named by them, so rename one")
    silo_rounds = rounds or (20 if len(files) > 1 else 1)
    if silo_rounds > settings.training.updates:
        raise PhotonError(
            f"--rounds={silo_rounds}: more than training.updates={settings.training.updates}; lower it"
        )
    encode = encoder_of(settings.encoder)
    policy = Policy(settings.policy, encode.size, seed=settings.training.seed)
    with Client(cache or output.parent / "replies", concurrency=concurrency) as client:
        client.check(players)
        orchestra = Orchestra(client, players, encode, settings)
        worlds = {}
        for name, asked in files.items():
            with _progress(f"drafts of {name}", len(asked)) as advance:
                worlds[name] = AskedWorld(orchestra, asked, lambda done, to=advance: to(done, 0))  # type: ignore[misc]
        _train(policy, settings.training, worlds, silo_rounds)
        failed = sum((world.failed for world in worlds.values()), Counter[str]())
        typer.echo(f"{client.tally.requests:,} requests, {client.tally.cached:,} answers from the cache")
    save_policy(output, policy, settings)
    if failed:
        typer.echo(f"left out because agents did not answer: {_counts(failed)}")
    typer.echo(f"policy: {output}; use it with --policy nexa:{output}")


def _check_file(output: Path) -> None:
    """Refuse a place where no policy could be written, before agents are asked."""
    for folder in (output, *output.parents):
        if folder.exists():
            if folder == output and folder.is_dir():
                raise PhotonError(f"--output {printable(output)}: is a folder; name a file in it")
            if folder != output and not folder.is_dir():
                raise PhotonError(f"--output {printable(output)}: {printable(folder)} is no folder")
            return


def _train(
    policy: "Policy", training: "TrainingSection", worlds: "Mapping[str, AskedWorld]", rounds: int
) -> None:
    """Train, in one place or in a federation, and say how it goes."""
    from photon.orchestration.federated import Federated
    from photon.orchestration.reinforce import Reinforce

    if len(worlds) == 1 and rounds == 1:
        (world,) = worlds.values()
        step = max(1, training.updates // 10)
        for update in Reinforce(policy, training, seed=training.seed).steps(world, training.updates):
            if update.number % step == 0 or update.number == training.updates:
                typer.echo(f"update {update.number:,}: {_told(update)}")
        return
    federation = Federated(policy, training, worlds, seed=training.seed)
    for one in federation.rounds(rounds, training.updates // rounds):
        silos = "; ".join(f"{name} {_told(update)}" for name, update in one.silos.items())
        typer.echo(f"round {one.number:,}: {silos}")


def _told(update: "Update") -> str:
    return f"reward {update.reward:.3f}, {update.edges:.1f} edges"
