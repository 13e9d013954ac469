"""What a run does for the federation above: train rounds, evaluate a model, describe the silos together."""

from photon.errors import PhotonError, RunError
from photon.federation.assignment import DESCRIPTION, EVALUATION, Assignment, Outcome
from photon.federation.federation import Federation
from photon.federation.roster import joined
from photon.files.atomic import write_text
from photon.link.messages import EvaluateReport, NodeLoss, SiloInfo
from photon.telemetry.events import Evaluated


def carry_out(federation: Federation, *, resume: bool) -> None:
    """Do what the federation above wants, and leave behind how it ended."""
    run_dir = federation.run_dir
    assignment = Assignment.read(run_dir)
    try:
        if assignment.kind == "train":
            federation.run(resume=resume, assignment=assignment)
        elif assignment.kind == "evaluate":
            report = _report(run_dir.name, assignment.round, federation.evaluate(assignment))
            write_text(run_dir / EVALUATION, report.model_dump_json() + "\n", flush=False)
        else:
            description = _together(federation, federation.gather())
            write_text(run_dir / DESCRIPTION, description.model_dump_json() + "\n", flush=False)
    except BaseException as error:
        Outcome(assignment=assignment.key, error=reason_of(error)).write(run_dir)
        raise
    Outcome(assignment=assignment.key).write(run_dir)


def reason_of(error: BaseException) -> str:
    """Return in one line why a run ended."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "stopped by the user"
    text = " ".join(str(error).split())
    return text if isinstance(error, PhotonError | RunError) else f"{type(error).__name__}: {text}"


def _report(name: str, server_round: int, evaluated: Evaluated) -> EvaluateReport:
    """Return the evaluation of a model by all silos as that of one."""
    return EvaluateReport(
        round=server_round,
        silo=name,
        loss=evaluated.loss,
        tokens=sum(silo["tokens"] for silo in evaluated.per_silo.values()),
        per_node={
            node: NodeLoss(loss=found["loss"], tokens=found["tokens"])
            for node, found in evaluated.per_node.items()
        },
        figures=evaluated.figures,
    )


def _together(federation: Federation, silos: list[SiloInfo]) -> SiloInfo:
    """Describe silos together under the name of the run's folder."""
    together = joined(federation.run_dir.name, silos)
    peaks = [silo.roofline_flops for silo in silos if silo.roofline_flops is not None]
    if federation.config.federation.engine != "deployment" or len(peaks) < len(silos):
        return together
    # They train at the same time, each on a device of its own.
    return together.model_copy(update={"roofline_flops": sum(peaks)})
