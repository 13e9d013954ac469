"""``photon unlearn``."""

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from photon.commands.given import Export

if TYPE_CHECKING:
    from rich.table import Table

    from photon.evaluation.unlearn import Outcome
    from photon.unlearning.questions import Question, Sets
    from photon.unlearning.scan import Seen

_FILE = "JSON or JSON lines with question, answer and edge."

_Output = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")]
_Forget = Annotated[Path, typer.Option(metavar="FILE", help=f"What is to be forgotten: {_FILE}")]
_Reference = Annotated[
    Path,
    typer.Option(metavar="FILE", help="Questions that the model refuses: question, no answer needed."),
]
_Retain = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What is to stay; default: the other edges of --forget."),
]
_Edge = Annotated[
    list[str] | None, typer.Option(help="Forget the questions of this edge alone; may be repeated.")
]
_Forgotten = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="What earlier requests were about, so that it stays forgotten."),
]
_Unknown = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Other questions that the model should refuse.")
]
_Factual = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Questions on other things, to be measured.")
]
_By = Annotated[str | None, typer.Option(help="Who asks; default: the user of this machine.")]
_Reason = Annotated[str, typer.Option(help="Why, for the ledger.")]
_Layers = Annotated[
    str | None, typer.Option(metavar="L,L,…", help="Blocks to try, from 0; default: the middle half.")
]
_Ridges = Annotated[str, typer.Option(metavar="X,X,…", help="Ridges to try.")]
_Coefficients = Annotated[str, typer.Option(metavar="X,X,…", help="Coefficients to try.")]
_Top = Annotated[int, typer.Option(min=1, help="Change this many blocks together.")]
_Solver = Annotated[
    Literal["closed", "adamw", "lora"],
    typer.Option(help="closed: ridge regression; adamw, lora: training, as the paper's code does it."),
]
_Positions = Annotated[
    Literal["last", "all", "from-first-difference"],
    typer.Option(help="Which tokens of what is to be forgotten are steered."),
]
_Retained = Annotated[
    Literal["all", "equal"], typer.Option(help="Retain all prompts, or as many as are forgotten.")
]
_Limit = Annotated[
    int, typer.Option(min=1, help="Most questions of each kind in the scan; at the end all are asked.")
]
_Attacks = Annotated[
    bool, typer.Option("--attacks", help="Try what brings back what was forgotten, and say how much.")
]
_Data = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Prepared data: its perplexity before and after.")
]
_Encoder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Sentence encoder of transformers, such as MiniLM; default: n-grams."),
]
_BatchSize = Annotated[int, typer.Option(min=1, help="Questions at once.")]
_Seed = Annotated[int, typer.Option(help="Of what is drawn.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def unlearn(
    export: Export,
    output: _Output,
    forget: _Forget,
    reference: _Reference,
    retain: _Retain = None,
    edge: _Edge = None,
    forgotten: _Forgotten = None,
    unknown: _Unknown = None,
    factual: _Factual = None,
    by: _By = None,
    reason: _Reason = "",
    layers: _Layers = None,
    ridges: _Ridges = "1e-3,1e-2",
    coefficients: _Coefficients = "0.5,1,2",
    top: _Top = 1,
    solver: _Solver = "closed",
    positions: _Positions = "last",
    retained: _Retained = "all",
    limit: _Limit = 64,
    attacks: _Attacks = False,
    data: _Data = None,
    encoder: _Encoder = None,
    batch_size: _BatchSize = 32,
    seed: _Seed = 0,
    device: _Device = "auto",
) -> None:
    """Make an exported model refuse some questions: one matrix is changed, the rest stays bit by bit."""
    from rich.console import Console

    from photon.evaluation.unlearn import unlearn as unlearn_export
    from photon.training.hardware import resolve_device
    from photon.unlearning.problem import Method
    from photon.unlearning.questions import read_questions
    from photon.unlearning.refusals import ngrams, sentence_encoder
    from photon.unlearning.request import Request
    from photon.unlearning.solve import Recipe

    earlier = [read_questions(file) for file in forgotten or []]
    request = Request(
        sets=_sets(forget, retain, reference, edge or [], [one for some in earlier for one in some]),
        earlier=earlier,
        asked_by=_who() if by is None else by,
        reason=reason,
        unknown=read_questions(unknown) if unknown else (),
        factual=read_questions(factual) if factual else (),
        method=Method(
            solver,
            positions,
            retained,
            Recipe(rank=8 if solver == "lora" else None, seed=seed),
            batch_size=batch_size,
            seed=seed,
        ),
        layers=None if layers is None else [int(one) for one in _numbers("--layers", layers, whole=True)],
        ridges=_numbers("--ridges", ridges),
        coefficients=_numbers("--coefficients", coefficients),
        top=top,
        encoder=sentence_encoder(encoder) if encoder else ngrams,
        limit=limit,
        attacks=attacks,
        data=data,
        batch_size=batch_size,
        device=resolve_device(device),
    )
    outcome = unlearn_export(export, output, request, lambda seen: typer.echo(_line(seen)))
    console = Console()
    console.print(_chosen(outcome))
    console.print(_figures(outcome))
    for note in outcome.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{output}: written, with {output / 'unlearned.json'}")
    typer.echo(last_line(outcome))


def _sets(
    forget: Path, retain: Path | None, reference: Path, edges: list[str], gone: "list[Question]"
) -> "Sets":
    from photon.errors import PhotonError, printable
    from photon.unlearning.questions import Sets, read_questions, split_by_edge

    if not edges and retain is None:
        raise PhotonError("--retain: give what is to stay, or name with --edge what of --forget is to go")
    wanted = read_questions(forget)
    stays: list[Question] = []
    if edges:
        wanted, stays = split_by_edge(wanted, edges, printable(forget))
    if retain is not None:
        stays = read_questions(retain)
    known = {one.key for one in gone}
    # What was forgotten before may still be in the file of what is to stay.
    stays = [one for one in stays if one.key not in known]
    return Sets(wanted, stays, read_questions(reference), [*dict.fromkeys(gone)])


def _who() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "somebody without a name"


def _numbers(option: str, text: str, *, whole: bool = False) -> list[float]:
    import math

    from photon.errors import PhotonError

    try:
        found = [int(one) if whole else float(one) for one in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(one) for one in found) or len(found) > 100:
        example = "1,2" if whole else "0.5,1"
        raise PhotonError(f"{option} {text!r}: expected numbers with commas between, as {example}")
    if option == "--ridges" and min(found) < 0:
        raise PhotonError(f"{option} {text!r}: a ridge is 0 at least")
    if option == "--coefficients" and 0 in found:
        raise PhotonError(f"{option} {text!r}: with 0 nothing is changed; leave it out")
    return list(dict.fromkeys(found))


def _line(seen: "Seen") -> str:
    choice, found = seen.choice, seen.found
    forget, retain, unknown = found["forget"], found["retain"], found["unknown"]
    return (
        f"layer {choice.layer}, ridge {choice.ridge:g}, coefficient {choice.coefficient:g}: forgotten "
        f"{forget['rouge1']:.2f}, refused {forget['refused']:.0%}; retained {retain['rouge1']:.2f}, refused "
        f"{retain['refused']:.0%}; unknown refused {unknown['refused']:.0%}; distance {seen.distance:.3f}"
    )


def _chosen(outcome: "Outcome") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(
        title="What was seen, the best first",
        caption="R_f, R_r: ROUGE-1 recall of what is to be forgotten and of what is retained; beside each, "
        "and of what is unknown, the share that is refused",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("layer", "ridge", "c", "R_f", "refused", "R_r", "refused", "unknown", "distance"):
        table.add_column(heading, justify="right")
    for seen in outcome.seen[:10]:
        forget, retain = seen.found["forget"], seen.found["retain"]
        table.add_row(
            str(seen.choice.layer),
            f"{seen.choice.ridge:g}",
            f"{seen.choice.coefficient:g}",
            f"{forget['rouge1']:.3f}",
            f"{forget['refused']:.2f}",
            f"{retain['rouge1']:.3f}",
            f"{retain['refused']:.2f}",
            f"{seen.found['unknown']['refused']:.2f}",
            f"{seen.distance:.3f}",
            style="bold" if seen.choice in outcome.chosen else None,
        )
    return table


def _figures(outcome: "Outcome") -> "Table":
    from rich import box
    from rich.table import Table

    from photon.unlearning.answers import score_of

    before, after = (score_of(found) for found in (outcome.before, outcome.after))
    table = Table(
        title="Before and after",
        caption=f"Deviation Score {before:.1f} → {after:.1f}; 0 is all forgotten and all retained",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("figure")
    for name in outcome.after:
        table.add_column(name, justify="right")
    figures = list(dict.fromkeys(figure for found in outcome.after.values() for figure in found))
    for figure in figures:
        cells = [
            _cell(outcome.before[name].get(figure), outcome.after[name].get(figure)) for name in outcome.after
        ]
        table.add_row(figure.replace("_", " "), *cells)
    return table


def _cell(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "–"
    return f"{before:.4g}" if before == after else f"{before:.3g} → {after:.3g}"


def last_line(outcome: "Outcome") -> str:
    """Return what nobody should miss: suppression is not deletion."""
    if not outcome.attacks:
        return (
            "Suppression is not deletion: what was forgotten is still in the weights; --attacks shows how "
            "much of it can be brought back."
        )
    name = max(outcome.attacks, key=lambda one: outcome.attacks[one]["rouge1"])
    found = ", ".join(f"{one} {figures['rouge1']:.2f}" for one, figures in outcome.attacks.items())
    before, after = (one["forget"]["rouge1"] for one in (outcome.before, outcome.after))
    return (
        f"Suppression is not deletion: the forgotten answers (ROUGE-1 {before:.2f} before, {after:.2f} now) "
        f"come back by: {found}; the strongest is {name!r}."
    )
