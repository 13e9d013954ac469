"""``photon tune``: a silo goes on alone from the model of a federation."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from photon.commands.given import Model
from photon.errors import PhotonError
from photon.files.owner import owned, refuse_if_going_on

if TYPE_CHECKING:
    from photon.config.schema import RunConfig
    from photon.data.prepared import PreparedData
    from photon.federation.personal import Origin

#: By how much the peak learning rate of a run is divided for what goes on from its end.
GENTLER = 10
#: What is trained on text of a kind, where it is not plain text.
_OBJECTIVES = {"chat": "sft", "questions": "sft", "pairs": "dpo"}
#: Keys that are decided by what the silo goes on from.
_DECIDED = ("data", "data.path", "data.source", "model", "model.warm_start", "run_dir")


def tune(
    context: typer.Context,
    source: Model,
    silo: Annotated[str, typer.Option(help="Name of the silo.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Prepared data with the silo's text; default: that of the run."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the new run; default: tuned/SILO in the run's folder."),
    ] = None,
) -> None:
    """Let a silo go on alone from the model of a federation; nothing of it leaves this machine.

    Further arguments are overrides, as of `photon train`: `rounds=8`, `local_steps=100`, `optimizer.lr=1e-4`.
    `photon resume` goes on with what was stopped.
    """
    from photon.federation.personal import TUNED, Origin, check_silo

    origin = Origin.open(source)
    if origin.run_dir is not None:
        refuse_if_going_on(origin.run_dir)
    prepared = origin.data(data)
    check_silo(prepared, silo)
    above = Path("runs") if origin.run_dir is None else origin.run_dir
    run_dir = (output or above / TUNED / silo).absolute()
    refuse_if_going_on(run_dir)

    from photon.commands.train import answer
    from photon.engine.start import start
    from photon.federation.run import check_run_dir
    from photon.objective.configured import check_data
    from photon.preflight import preflight

    config = _composed(origin, prepared, list(context.args))
    config = config.model_copy(update={"run_dir": str(run_dir)})
    check_data(config, prepared)
    with owned(run_dir):
        check_run_dir(config, resume=False)
        model, text = origin.write(run_dir, silo, prepared)
    changes = {
        "model": config.model.model_copy(update={"warm_start": str(model)}),
        "data": config.data.model_copy(update={"path": str(text)}),
    }
    start(preflight(config.model_copy(update=changes)), answer, resume=False)


def _composed(origin: "Origin", prepared: "PreparedData", overrides: list[str]) -> "RunConfig":
    """Return the configuration of a run of one silo; what it starts from and reads is put in later."""
    from photon.commands.hydra_line import key_of
    from photon.config.compose import compose

    keys = {override: key_of(override) for override in overrides}
    for override, key in keys.items():
        if key in _DECIDED:
            mend = "--output" if key == "run_dir" else "--data" if key.startswith("data") else "SOURCE"
            raise PhotonError(f"{override}: a silo goes on from its own model and text; use {mend}")
    chosen = [
        *("model=custom", "model.warm_start=elsewhere", "data=prepared", "data.path=elsewhere"),
        f"model.sequence_length={prepared.manifest.sequence_length}",
        f"objective={_OBJECTIVES.get(prepared.manifest.kind, 'causal_lm')}",
        *("federation=inprocess", "cohort=null", "rounds=4", "evaluation.before_merge=false"),
        *_as_in_the_run(origin.config),
        *("model.recipe.steps=null", "model.recipe.warmup_steps=0"),
        "model.recipe.batch_size=${model.recipe.local_batch_size}",
    ]
    # A group may be chosen once.
    mine = [one for one in chosen if one.partition("=")[0] not in keys.values()]
    config = compose([*mine, *overrides])
    if config.federation.engine == "deployment":
        raise PhotonError("federation=deployment: what a silo tunes stays on its machine; leave it out")
    return config


def _as_in_the_run(config: "RunConfig | None") -> list[str]:
    """Return what is set as in the run that a silo goes on from, so that figures can be compared."""
    if config is None:
        return [f"model.recipe.learning_rate={6e-4 / GENTLER}"]
    training, evaluation = config.training, config.evaluation
    values: dict[str, object] = {
        "seed": config.seed,
        "model.recipe.learning_rate": config.model.recipe.learning_rate / GENTLER,
        "model.recipe.local_batch_size": training.batch_size,
        "training.precision": training.precision,
        "training.matmul_precision": training.matmul_precision,
        "training.device": training.device,
        "evaluation.sequences": evaluation.sequences,
        "evaluation.batch_size": evaluation.batch_size,
    }
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]
