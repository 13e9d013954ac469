"""Prepare text, train, and lay runs side by side."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from photon.api.run import AnyPath, Run
from photon.api.turn import Shown, shown_as, turn
from photon.config.compose import compose
from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.preflight import preflight

if TYPE_CHECKING:
    from pandas import DataFrame

    from photon.data.alike import Comparison
    from photon.data.documents import TextKind
    from photon.data.prepared import Manifest


def prepare(
    sources: Mapping[str, AnyPath | Sequence[AnyPath]],
    output: AnyPath,
    *,
    partition: str = "by-source",
    vocab_size: int = 8192,
    tokenizer: AnyPath | None = None,
    sequence_length: int = 128,
    validation_fraction: float = 0.05,
    seed: int = 0,
    near_duplicates: "Comparison" = "words",
    kind: "TextKind" = "text",
    text_field: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> "Manifest":
    """Turn text into packed windows of tokens, as ``photon data prepare`` does.

    Parameters that are not listed here are the command's options.

    Parameters
    ----------
    sources
        Files and folders by the name of their source: the silo's, unless ``partition`` says otherwise.
    output
        Folder to write.

    Returns
    -------
    Manifest
        What was prepared: silos with their tokens, and what was left out.

    Raises
    ------
    PhotonError
        If there is no text, or an option cannot be.
    """
    from photon.data.prepare import prepare as prepare_files

    paths = {
        name: [Path(of)] if isinstance(of, str | Path) else [Path(path) for path in of]
        for name, of in sources.items()
    }
    return prepare_files(
        paths,
        Path(output),
        partition=partition,
        vocab_size=vocab_size,
        tokenizer=None if tokenizer is None else Path(tokenizer),
        sequence_length=sequence_length,
        validation_fraction=validation_fraction,
        seed=seed,
        near_duplicates=near_duplicates,
        kind=kind,
        text_field=text_field,
        overwrite=overwrite,
        progress=progress,
    )


def train(
    overrides: RunConfig | Iterable[str] = (),
    *,
    run_dir: AnyPath | None = None,
    display: Shown | None = None,
) -> Run:
    """Train a federation, as ``photon train`` does.

    Parameters
    ----------
    overrides
        Hydra overrides of the configuration, such as ``["strategy=diloco", "rounds=4"]``; or all of it.
    run_dir
        Folder of the run; None: what the configuration says, or a new one in ``runs/``.
    display
        What is shown meanwhile; None: what the configuration says. A notebook gets a line a round.

    Returns
    -------
    Run
        The run, finished.

    Raises
    ------
    PhotonError
        For bad input, before anything is started.
    RunError
        If the run stopped; ``Run(run_dir).resume()`` goes on with it.
    KeyboardInterrupt
        If it was interrupted, likewise.
    """
    from photon.engine.start import start
    from photon.federation.run import new_run_name
    from photon.node import answer

    if isinstance(overrides, str):
        raise PhotonError(f"overrides: expected a list of texts, as [{overrides!r}]")
    with turn():
        composed = overrides if isinstance(overrides, RunConfig) else compose(list(overrides))
        config = preflight(shown_as(composed, display))
        folder = Path(run_dir or config.run_dir or Path("runs") / new_run_name(config)).absolute()
        start(config.model_copy(update={"run_dir": str(folder)}), answer, resume=False)
    return Run(folder)


def compare(runs: Iterable[Run | AnyPath], *, report: AnyPath | None = None) -> "DataFrame":
    """Lay runs side by side.

    Parameters
    ----------
    runs
        Runs or their folders.
    report
        HTML file to write, with their curves in the same pictures; None: none.

    Returns
    -------
    DataFrame
        A row for each, the lowest perplexity first: ``run``, ``strategy``, ``model``, ``rounds``, ``tokens``,
        ``perplexity`` (the last that was measured), ``bytes_up`` and ``bytes_down`` (of rounds and
        evaluations), ``seconds`` (of the rounds).

    Raises
    ------
    PhotonError
        If one of them is no run.
    """
    from pandas import DataFrame

    from photon.report.write import write_report
    from photon.telemetry.summary import bytes_of, last_start

    rows, opened = [], [run if isinstance(run, Run) else Run(run) for run in runs]
    for run in opened:
        history, started = run.history, last_start(run.events)
        measured = history["perplexity"].dropna()
        exchanged = bytes_of(run.events)
        rows.append(
            {
                "run": run.run_dir.name,
                "strategy": started.strategy,
                "model": started.model,
                "rounds": run.rounds,
                "tokens": int(history["tokens"].max()) if len(history) else 0,
                "perplexity": float(measured.iloc[-1]) if len(measured) else float("nan"),
                "bytes_up": float(exchanged["up"]),
                "bytes_down": float(exchanged["down"]),
                "seconds": float(history["seconds"].sum()),
            }
        )
    if report is not None:
        write_report([run.run_dir for run in opened], Path(report))
    return DataFrame(rows).sort_values("perplexity", ignore_index=True) if rows else DataFrame(rows)
