"""What a finished run leaves behind, and how that is shown."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from photon.config.schema import RunConfig
from photon.errors import PhotonError, printable
from photon.files.atomic import write_text
from photon.state.checkpoint import Checkpoint, weights_sha256
from photon.telemetry.events import EventStream, Notice, RunFinished
from photon.telemetry.log import read_events, read_summary
from photon.telemetry.summary import build_summary, print_summary


def finish(config: RunConfig, run_dir: Path, checkpoint: Checkpoint, stream: EventStream) -> dict[str, Any]:
    """Write the summary of a run that has come to its end, its export and its report; return the summary."""
    params = checkpoint.load_params()
    summary = build_summary(read_events(run_dir / "events.jsonl"), weights_sha256=weights_sha256(params))
    write_text(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    stream.emit(RunFinished(summary=summary))
    if config.telemetry.export:
        from photon.evaluation.export import export_run

        try:
            export_run(run_dir, run_dir / "export")
        except PhotonError as error:
            stream.emit(Notice(level="warning", message=f"no export: {error}"))
    if config.telemetry.report:
        from photon.report.write import write_report

        write_report([run_dir], run_dir / "report.html")
    return summary


def show(config: RunConfig) -> dict[str, Any]:
    """Print a finished run's summary and a sample of its text."""
    assert config.run_dir is not None, "prepare_run fills it in"
    run_dir = Path(config.run_dir)
    summary = read_summary(run_dir)
    if config.telemetry.display == "none":
        return summary
    export = run_dir / "export"
    report = run_dir / "report.html"
    sample = None
    if config.telemetry.sample_tokens and export.is_dir():
        from photon.evaluation.generate import generate_text

        sample = generate_text(
            export, config.telemetry.sample_prompt, max_new_tokens=config.telemetry.sample_tokens
        )
    try:
        print_summary(
            Console(),
            summary,
            report_path=report if report.exists() else None,
            export_path=export if export.is_dir() else None,
            sample=sample,
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"{printable(run_dir / 'summary.json')}: not the summary of a run"
        said = f"{type(error).__name__}: {printable(error)}"
        raise PhotonError(f"{what} ({said}); remove it, and `photon resume` writes it anew") from error
    return summary
