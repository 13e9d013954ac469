"""A sweep: ``photon train -m outer=fedavg,diloco seed=0,1``, in turn, in parallel, or by Optuna."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from photon.commands.hydra_line import call_hydra, in_one_line, key_of
from photon.commands.jobs import PLAN, SWEEPER, Plan
from photon.commands.ranking import RANKING, Ranked, check_metric, print_ranking, ranked, write_ranking
from photon.commands.search import read_search
from photon.errors import PhotonError, RunError
from photon.files.owner import OWNER, held


def sweep(
    overrides: Sequence[str],
    train_one: Callable[[Any], float | None],
    *,
    metric: str,
    maximize: bool,
) -> None:
    """Train every combination, one run folder each, rank the runs, and lay them side by side in one report.

    Every value of the sweep is checked before the first run starts. A folder that holds the same sweep
    already is gone on with: what is finished is not trained again.

    Parameters
    ----------
    overrides
        Hydra overrides, some with several values.
    train_one
        Trains one combination, from what Hydra composed, and returns its figure. Parallel runs import it by
        its name.
    metric, maximize
        The figure of ``summary.json`` to rank by, and whether the largest is the best.

    Raises
    ------
    PhotonError
        If a value is wrong, or the folder holds something else.
    RunError
        If runs failed; the others are trained, ranked and compared all the same.
    """
    check_metric(metric)
    plan, settings, where = read_search(overrides, metric, maximize=maximize)
    folder = Path(where)
    with held(folder, "hydra.sweep.dir") as is_ours:
        if not is_ours:
            raise PhotonError(f"{folder}: another sweep is at work there; choose another hydra.sweep.dir")
        _check_folder(folder, plan)
        plan.write(folder)
        kept = [one for one in overrides if key_of(one) != "hydra.sweep.dir"]
        escaped = str(folder).replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
        arguments = ["--multirun", *kept, *settings, f'hydra.sweep.dir="{escaped}"']
        os.environ[SWEEPER] = str(os.getpid())
        try:
            ended = _run(arguments, train_one)
        except KeyboardInterrupt:
            with suppress(OSError):
                told = f"the sweep was stopped; go on with the same command and hydra.sweep.dir={folder}"
                Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(told)
            write_ranking(folder, ranked(folder, metric, maximize=maximize), plan)
            raise
        _conclude(folder, plan, ended)


def _run(arguments: Sequence[str], train_one: Callable[[Any], float | None]) -> str | None:
    """Let Hydra go through the sweep; return why it ended before its time; None: it did not."""
    try:
        call_hydra(arguments, train_one)
    except PhotonError:
        raise
    except Exception as error:
        # A worker of joblib's may have been killed. Optuna looks for the best run, and there may be none.
        return None if "No trials are completed" in str(error) else in_one_line(error)
    return None


def _check_folder(folder: Path, plan: Plan) -> None:
    """Check that a folder is empty, or holds this very sweep."""
    if not (folder / PLAN).exists():
        if [path for path in folder.iterdir() if path.name != OWNER]:
            raise PhotonError(
                f"{folder}: holds something that is not of this sweep; choose another hydra.sweep.dir"
            )
        return
    there = Plan.read(folder)
    if there == plan:
        return
    other = "choose another hydra.sweep.dir"
    if there.overrides != plan.overrides:
        raise PhotonError(
            f"{folder}: holds another sweep ({' '.join(there.overrides)}); {other}, or give the same "
            "overrides in the same order to go on with that"
        )
    if (there.metric, there.maximize) != (plan.metric, plan.maximize):
        by = f"{there.metric}{' --maximize' if there.maximize else ''}"
        raise PhotonError(
            f"{folder}: the sweep there ranks by --metric {by}; go on with that, or {other}; another ranking "
            f"is printed by `photon ranking {folder} --metric {plan.metric}`"
        )
    raise PhotonError(
        f"{folder}: the sweep there was begun with another configuration, because what conf/ says has "
        f"changed since; {other}"
    )


def _conclude(folder: Path, plan: Plan, ended: str | None) -> None:
    """Rank the runs of a sweep, and lay those that are finished side by side."""
    from photon.report.write import write_report
    from photon.telemetry.summary import counted

    rows = ranked(folder, plan.metric, maximize=plan.maximize)
    if ended is not None and not rows:
        raise RunError(f"{folder}: the sweep ended before its first run ({ended})")
    if finished := [row.job.folder for row in rows if row.job.is_finished]:
        write_report(finished, folder / "report.html")
    write_ranking(folder, rows, plan)
    print_ranking(rows, plan)
    if finished:
        told = f"{counted(len(finished), 'run')} side by side: {folder / 'report.html'}"
        Console().print(told, soft_wrap=True)
    Console().print(f"this ranking: {folder / RANKING}", soft_wrap=True)
    if ended is not None:
        raise RunError(
            f"{folder}: the sweep ended before its time ({ended}); the same command goes on with it"
        )
    if failed := [row for row in rows if row.value is None]:
        raise RunError(f"{len(failed)} of {counted(len(rows), 'run')} failed: {_names(failed)}")


def _names(rows: Sequence[Ranked]) -> str:
    return ", ".join(str(row.job.folder) for row in rows)
