"""``photon walltime``: what a run would take on a given network, and how often to sync what."""

import re
from pathlib import Path
from typing import Annotated

import typer

from photon.errors import PhotonError
from photon.walltime.model import TOPOLOGIES, Network, Topology, WallTime, methods, wall_time

app = typer.Typer(help="Estimate wall-clock time, and suggest sync periods.", no_args_is_help=True)

#: Bits per second by unit.
_UNITS = {"kbps": 1e3, "mbps": 1e6, "gbps": 1e9, "tbps": 1e12}


@app.command()
def compare(
    model: Annotated[str | None, typer.Option(help="Preset of conf/model: its parameters.")] = None,
    parameters: Annotated[float | None, typer.Option(help="Parameters, instead of --model.")] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN_DIR", help="Take what is not given from this run's own figures."),
    ] = None,
    silos: Annotated[int | None, typer.Option(min=1, help="Silos that train together.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Local steps of each silo.")] = None,
    local_steps: Annotated[int | None, typer.Option(min=1, help="Local steps of a round.")] = None,
    throughput: Annotated[float | None, typer.Option(help="Steps per second of a silo.")] = None,
    bandwidth: Annotated[str, typer.Option(help="Of the slowest link: kbps, Mbps, Gbps, Tbps.")] = "10Gbps",
    latency: Annotated[float, typer.Option(min=0, help="Seconds that every sync takes besides.")] = 0.0,
    bytes_per_parameter: Annotated[float, typer.Option(help="2 for bfloat16, 4 for float32.")] = 2.0,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="Share of communication that computing hides.")
    ] = 0.0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw total time over bandwidth (svg, png, pdf).")
    ] = None,
) -> None:
    """Compare what DDP, FedAvg, Local Adam and DES-LOC take on a network, by three ways of averaging.

    `photon walltime compare --model photon-7b --silos 4 --steps 11000 --local-steps 500 --throughput 0.032`
    """
    from rich.console import Console
    from rich.table import Table

    given = {
        "parameters": parameters or (_parameters(model) if model else None),
        "silos": silos,
        "steps": steps,
        "local_steps": local_steps,
        "throughput": throughput,
    }
    known = _complete(given, _measured(run) if run else {})
    payload = known["parameters"] * bytes_per_parameter

    def time_of(plan: dict[str, int], topology: Topology, speed: float) -> WallTime:
        network = Network(int(known["silos"]), speed, latency, topology, 1 - overlap)
        return wall_time(int(known["steps"]), known["throughput"], plan, payload, network)

    plans = methods(int(known["local_steps"]))
    speed = bytes_per_second(bandwidth)
    table = Table(
        title=f"{known['parameters']:,.0f} parameters, {known['silos']:.0f} silos, "
        f"{known['steps']:,.0f} steps of {1 / known['throughput']:.3g} s, {known['local_steps']:.0f} a "
        f"round, {bandwidth}: hours"
    )
    for column in ("method", "compute", *(f"total, {topology}" for topology in TOPOLOGIES), "GB per silo"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, plan in plans.items():
        times = [time_of(plan, topology, speed) for topology in TOPOLOGIES]
        hours = [times[0].compute / 3600, *(time.total / 3600 for time in times)]
        table.add_row(name, *(f"{one:.2f}" for one in hours), f"{times[0].syncs * payload / 1e9:,.1f}")
    Console().print(table)
    if plot:
        speeds = [10 ** (step / 10) for step in range(60, 121)]
        curves = {
            name: [time_of(plan, "ring", bits / 8).total / 3600 for bits in speeds]
            for name, plan in plans.items()
        }
        _draw(plot, speeds, curves)
        typer.echo(str(plot))


@app.command()
def suggest(
    optimizer: Annotated[str, typer.Option(help="Preset of conf/optimizer.")] = "adamw",
    local_steps: Annotated[int, typer.Option(min=1, help="Period of the parameters.")] = 64,
) -> None:
    """Suggest sync periods of the local optimizer's states, from their half-lives and by DES-LOC's ratio."""
    from rich.console import Console
    from rich.table import Table

    from photon.config.compose import compose
    from photon.strategy.sync import betas_of, half_life, suggest_periods, written
    from photon.training.states import optimizer_groups, synced_together

    section = compose([f"optimizer={optimizer}"]).optimizer
    groups = optimizer_groups(section)
    if not groups:
        raise PhotonError(f"walltime: optimizer={optimizer} has no state to average")
    decays, together = betas_of(section.as_mapping(), groups), synced_together(section)
    by_ratio = suggest_periods(groups, local_steps, together=together)
    by_half_life = suggest_periods(groups, local_steps, decays, together)
    table = Table(title=f"Sync periods in local steps, optimizer={optimizer}")
    for column in ("state group", "β", "half-life", "by half-life", "by DES-LOC's ratio"):
        table.add_column(column, justify="left" if column == "state group" else "right")
    table.add_row("params", "–", "–", str(local_steps), str(local_steps))
    for group in groups:
        beta = decays.get(group)
        known = ("–", "–") if not beta else (f"{beta:g}", f"{half_life(beta):,.1f}")
        table.add_row(group, *known, str(by_half_life[group]), str(by_ratio[group]))
    console = Console()
    console.print(table)
    chosen = f"strategy=desloc optimizer={optimizer} local_steps={local_steps}"
    console.print(f"photon train {chosen} '{written(by_ratio)}'", soft_wrap=True)


def bytes_per_second(text: str) -> float:
    """Read a bandwidth such as ``10Gbps``.

    Raises
    ------
    PhotonError
        If it is no number with a unit.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise PhotonError(
            f"walltime: --bandwidth={text}: expected a number and kbps, Mbps, Gbps or Tbps, as in 10Gbps"
        )
    return float(match[1]) * _UNITS[match[2]] / 8


def _parameters(model: str) -> float:
    from photon.config.compose import compose
    from photon.models.build import build_model, parameter_count

    section = compose([f"model={model}"]).model
    if section.vocab_size is None:
        raise PhotonError(f"walltime: model={model} takes its vocabulary from the data; give --parameters")
    return float(parameter_count(build_model(section, section.vocab_size, seed=0, device="meta")))


def _measured(run: Path) -> dict[str, float]:
    """Return what a finished run has measured."""
    from photon.config.compose import load
    from photon.telemetry.events import RunStarted, SiloFinished
    from photon.telemetry.log import current_history, read_events

    config = load(run / "config.yaml")
    history = current_history(read_events(run / "events.jsonl"))
    started = [event for event in history if isinstance(event, RunStarted)]
    silos = [event for event in history if isinstance(event, SiloFinished)]
    if not started or not silos:
        raise PhotonError(f"{run}: no round of it is finished; there is nothing to take figures from")
    return {
        "parameters": float(started[-1].parameters),
        "silos": float(started[-1].cohort),
        "steps": float(config.total_steps),
        "local_steps": float(config.local_steps),
        "throughput": sum(c.steps for c in silos) / sum(c.seconds["training"] for c in silos),
    }


def _draw(path: Path, speeds: list[float], curves: dict[str, list[float]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, hours in curves.items():
        axes.loglog(speeds, hours, label=name)
    axes.set(xlabel="bandwidth of the slowest link (bit/s)", ylabel="hours, ring all-reduce")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise PhotonError(f"walltime: --plot={path}: {error}") from error
    finally:
        pyplot.close(figure)


def _complete(given: dict[str, float | None], measured: dict[str, float]) -> dict[str, float]:
    known = {}
    for name, value in given.items():
        number = measured.get(name) if value is None else value
        if number is None or not number > 0:
            raise PhotonError(f"walltime: --{name.replace('_', '-')} is needed, or a --run that measured it")
        known[name] = number
    return known
