"""``photon evaluate`` and ``photon generate``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from photon.commands.given import LARGEST_SEED, Model

if TYPE_CHECKING:
    from rich.table import Table

    from photon.data.prepared import Manifest
    from photon.evaluation.iterations import Iterated
    from photon.objective.perplexity import Score


def evaluate(
    model: Model,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Prepared data.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks and suites (photon, desloc, abbie), commas between."),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of task files; without it lm-eval fetches its own tasks."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; default: the suite's, or none.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task; default: all.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put questions by the model's chat template.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Results of tasks; default: tasks.json in the model's folder."),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Validation windows per silo, evenly spaced; default: all.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows per forward pass (32), or sequences of tasks (1).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            help="auto (what is fast on the device; for tasks, the export's own), fp32, bf16 or fp16: "
            "last digits differ."
        ),
    ] = "auto",
    iterations: Annotated[
        str | None,
        typer.Option(metavar="R,R,…", help="Passes through the body of an AbbIE model to try, as 1,2,4,8."),
    ] = None,
) -> None:
    """Print a model's perplexity on prepared data, silo by silo, or its accuracy on tasks."""
    from photon.errors import PhotonError

    if tasks is None:
        others = {"--task-data": task_data, "--shots": shots, "--limit": limit, "--output": output}
        for option, value in {**others, "--chat": chat or None}.items():
            if value is not None:
                raise PhotonError(f"{option} is of tasks; name them with --tasks")
    if data is None and tasks is None:
        raise PhotonError("nothing to evaluate on: give prepared data with --data, or tasks with --tasks")
    numbers = None if iterations is None else _numbers(iterations)
    if tasks is not None and numbers is not None and len(numbers) > 1:
        raise PhotonError(f"--iterations={iterations}: tasks are asked at one number; name --output for each")
    if data is not None:
        _on_data(model, data, sequences, batch_size or 32, device, precision, numbers)
    if tasks is not None:
        from photon.evaluation.opened import opened_export
        from photon.evaluation.suites import asked_tasks
        from photon.evaluation.tasks import evaluate_tasks, write_tasks
        from photon.training.hardware import resolve_device

        with opened_export(model, _say) as export:
            results = evaluate_tasks(
                export,
                asked_tasks(tasks, shots),
                task_data=task_data,
                limit=limit,
                batch_size=batch_size or 1,
                device=resolve_device(device),
                precision=precision,
                chat=chat,
                iterations=numbers[0] if numbers else None,
            )
        _print_tasks(results)
        write_tasks(results, output or model / "tasks.json")


def _on_data(
    model: Path,
    data: Path,
    sequences: int | None,
    batch_size: int,
    device: str,
    precision: str,
    numbers: list[int] | None,
) -> None:
    from rich.console import Console
    from torch.nn import Module

    from photon.data.prepared import PreparedData
    from photon.evaluation.iterations import evaluate_iterations
    from photon.evaluation.load import check_tokenizer, open_trained
    from photon.evaluation.perplexity import bf16_gain, evaluate_data
    from photon.training.hardware import resolve_device
    from photon.training.precision import resolve_precision

    where = resolve_device(device)
    if precision != "auto":
        resolve_precision(precision, where)  # a wrong name is told before anything is read
    prepared = PreparedData.open(data)
    trained = open_trained(model)
    check_tokenizer(trained, prepared)
    # No longer than the data's: the model may take no more.
    tokens = min(128, prepared.manifest.sequence_length)
    chosen = resolve_precision(precision, where, lambda: bf16_gain(trained.model, tokens))
    placed = Module.to(trained.model, where)
    if numbers is not None:
        found = evaluate_iterations(
            placed,
            prepared,
            numbers,
            batch_size=batch_size,
            device=where,
            precision=chosen,
            limit=sequences,
        )
        Console().print(_iterations_table(trained.name, chosen, found))
        return
    scores = evaluate_data(
        placed, prepared, batch_size=batch_size, device=where, precision=chosen, limit=sequences
    )
    Console().print(_table(trained.name, chosen, scores, prepared.manifest))


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue; empty starts a new document.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens to choose among at each step.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the choices.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    iterations: Annotated[
        int | None, typer.Option(help="Passes through the body of an AbbIE model; default: as in training.")
    ] = None,
) -> None:
    """Continue a prompt with a trained model: of a run the newest."""
    from photon.evaluation.generate import generate_text
    from photon.evaluation.opened import opened_export
    from photon.training.hardware import resolve_device

    where = str(resolve_device(device))
    with opened_export(model, _say) as export:
        text = generate_text(
            export,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            device=where,
            iterations=iterations,
        )
    typer.echo(text)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _numbers(text: str) -> list[int]:
    from photon.errors import PhotonError

    try:
        return sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise PhotonError(f"--iterations={text!r}: expected numbers, as 1,2,4,8") from None


def _iterations_table(name: str, precision: str, found: "dict[int, Iterated]") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from photon.errors import printable
    from photon.evaluation.perplexity import overall

    table = Table(
        title=Text(f"Validation perplexity of {printable(name)} by iterations"),
        caption=f"computed in {precision}; angle: of the last pass, between the states before and after it",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("silo")
    for number in found:
        table.add_column(f"r = {number}", justify="right")
    silos = list(next(iter(found.values())).scores)
    for silo in silos:
        cells = (_perplexity(one.scores[silo]) for one in found.values())
        table.add_row(silo, *cells, end_section=silo == silos[-1])
    table.add_row("overall", *(_perplexity(overall(one.scores)) for one in found.values()))
    table.add_row("angle (rad)", *(f"{one.angle:.4f}" for one in found.values()))
    return table


def _table(name: str, precision: str, scores: "dict[str, Score]", manifest: "Manifest") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from photon.errors import printable
    from photon.evaluation.perplexity import overall
    from photon.telemetry.events import perplexity_text
    from photon.telemetry.summary import mixed_perplexity

    title = Text(f"Validation perplexity of {printable(name)}")
    table = Table(
        title=title,
        caption=f"computed in {precision}",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("silo")
    for heading in ("tokens", "loss (nats)", "perplexity", "unigram perplexity"):
        table.add_column(heading, justify="right")
    losses = {silo: entry.unigram_loss for silo, entry in manifest.silos.items()}
    rows = [
        (silo, score, mixed_perplexity({silo: losses[silo]}, {silo: 1})) for silo, score in scores.items()
    ]
    # Of the same mixture of text as the model's: the silos weighted by the tokens that it predicted.
    mixture = {silo: score.tokens for silo, score in scores.items()}
    rows.append(("overall", overall(scores), mixed_perplexity(losses, mixture)))
    for silo, score, unigram in rows:
        table.add_row(
            silo,
            f"{score.tokens:,}",
            f"{score.loss:.4f}",
            _perplexity(score),
            perplexity_text(unigram, 2),
            end_section=silo == rows[-2][0],
        )
    return table


def _perplexity(score: "Score") -> str:
    from photon.telemetry.events import perplexity_text

    return perplexity_text(score.perplexity, 2, loss=score.loss)


def _print_tasks(results: "dict[str, Any]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from photon.errors import printable

    title = Text(f"Tasks of {printable(results['model'])}")
    settings = results["settings"]
    caption = f"lm-eval {results['lm_eval']}, computed in {settings['dtype']}"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("task")
    for heading in ("questions", "examples", "figure", "value", "error"):
        table.add_column(heading, justify="right")
    for task, entry in results["tasks"].items():
        metrics = entry["metrics"]
        for row, name in enumerate(name for name in metrics if "_stderr" not in name):
            base, comma, chosen = name.partition(",")
            error = metrics.get(f"{base}_stderr{comma}{chosen}")
            first = (printable(task), f"{entry['questions']:,}", str(entry["shots"]))
            table.add_row(
                *(first if row == 0 else ("", "", "")),
                name.replace("_", " "),
                f"{metrics[name]:.4f}" if metrics[name] < 1000 else f"{metrics[name]:.4g}",
                "" if error is None else f"±{error:.4f}",
            )
    console = Console()
    console.print(table)
    for suite, average in results["suites"].items():
        if average["accuracy"] is not None:
            above = average["above_chance"]
            told = "" if above is None else f", above chance {above:.4f}"
            console.print(f"{suite}: accuracy {average['accuracy']:.4f} over {average['tasks']} tasks{told}")
    if results["missing"]:
        console.print(f"not there: {', '.join(results['missing'])}")
