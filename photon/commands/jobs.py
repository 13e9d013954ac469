"""What a sweep keeps in its folder: what it was asked for, and how each of its runs ended."""

import json
import math
import os
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from photon.commands.hydra_line import in_one_line
from photon.errors import PhotonError, RunError
from photon.files.atomic import write_text
from photon.files.json_object import read_object
from photon.files.owner import is_going_on
from photon.files.processes import end_with_parent

if TYPE_CHECKING:
    from photon.link.answer import Answer

#: File of a sweep's folder that says what it was asked for.
PLAN = "sweep.json"
#: File of a run's folder that whoever trains one combination writes first.
JOB = "job.json"
#: And that an error which nobody expected leaves there.
TRACEBACK = "traceback.txt"
#: Environment variable with the process that sweeps.
SWEEPER = "PHOTON_SWEEPER"


@dataclass(frozen=True)
class Plan:
    """What a sweep was asked for.

    Attributes
    ----------
    overrides
        Those that say what is trained, in order.
    swept
        The keys that have more than one value.
    metric, maximize
        The figure of a run's summary by which runs are ranked, and whether the largest is the best.
    configuration
        Hash of all that the swept values compose to.
    """

    overrides: list[str]
    swept: list[str]
    metric: str
    maximize: bool
    configuration: str

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """Read the plan in a sweep's folder.

        Raises
        ------
        PhotonError
            If there is none, or it cannot be read.
        """
        path = folder / PLAN
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            raise PhotonError(
                f"{folder}: holds no sweep; name a folder that `photon train -m` made"
            ) from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise PhotonError(f"{path}: cannot be read ({error}); choose another hydra.sweep.dir") from None

    def write(self, folder: Path) -> None:
        """Write the plan to a sweep's folder."""
        write_text(folder / PLAN, json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Job:
    """A run of a sweep: its folder, its overrides, and why it failed; None: it did not, or not yet."""

    folder: Path
    overrides: list[str]
    reason: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "Job | None":
        """Read the job whose run lies in a folder; None: there is none."""
        path = folder / JOB
        try:
            found = json.loads(path.read_text())
            return cls(folder, list(found["overrides"]), found["reason"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise PhotonError(f"{path}: cannot be read ({error}); remove {folder}") from None

    def write(self) -> None:
        """Write down how the run stands."""
        kept = {"overrides": self.overrides, "reason": self.reason}
        write_text(self.folder / JOB, json.dumps(kept, indent=1) + "\n")

    @property
    def is_finished(self) -> bool:
        """Whether all rounds are done."""
        return (self.folder / "summary.json").is_file()

    def value(self, metric: str) -> float | None:
        """Return a figure of the run; None: it is not finished, or has no such figure."""
        if not (self.folder / "summary.json").exists():
            return None
        try:
            figure = figure_of(read_object(self.folder / "summary.json"), metric.split("."))
        except PhotonError as error:
            raise PhotonError(f"{error}; remove {self.folder}") from None
        return figure if figure is not None and math.isfinite(figure) else None


def jobs_in(folder: Path) -> list[Job]:
    """Return the jobs of the sweep in a folder, by their number."""

    def number(job: Job) -> tuple[int, str]:
        digits = job.folder.name.partition("-")[0]
        return (int(digits) if digits.isdecimal() else 0, job.folder.name)

    found = (Job.read(path) for path in folder.glob("*") if path.is_dir())
    return sorted((job for job in found if job is not None), key=number)


def figure_of(found: Any, path: Sequence[str]) -> float | None:
    """Return the number at a path of keys, which may have dots in them; None: there is none."""
    if not path:
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
    if not isinstance(found, dict):
        return None
    for length in range(len(path), 0, -1):
        if (key := ".".join(path[:length])) in found:
            return figure_of(found[key], path[length:])
    return None


def train_job(composed: Any, answer: "Answer") -> float | None:
    """Train one combination of a sweep in the folder that Hydra chose for it, and return its figure.

    One that is finished is not trained again, one that was stopped goes on, and one that has failed is left
    as it is. None: it has failed, and said why.
    """
    from hydra.core.hydra_config import HydraConfig

    chosen = HydraConfig.get()
    if os.environ.get(SWEEPER) != str(os.getpid()):
        # A job of joblib's goes on otherwise when the sweep is killed.
        end_with_parent()
    folder = Path(chosen.runtime.output_dir)
    metric = Plan.read(Path(chosen.sweep.dir)).metric
    overrides = list(chosen.overrides.task)
    job = Job.read(folder) or Job(folder, overrides)
    if job.overrides != overrides:
        _say(folder, f"holds a run of other values ({' '.join(job.overrides)}); remove the folder")
        return None
    if job.is_finished:
        return job.value(metric)
    if job.reason is not None:
        _say(folder, f"has failed before ({job.reason}); remove the folder to train it again")
        return None
    if is_going_on(folder):
        _say(folder, "the run is still going on in another process; it is left to that")
        return None
    job.write()
    try:
        _train(composed, folder, answer)
        if (value := job.value(metric)) is None:
            raise RunError(f"its {metric} is no number: it diverged, or this run has no such figure")
        return value
    except (PhotonError, RunError) as error:
        reason = str(error).removeprefix(f"{folder}: ")
    except Exception as error:
        # Whatever it is, the other runs of the sweep have nothing to do with it.
        write_text(folder / TRACEBACK, traceback.format_exc())
        reason = f"{in_one_line(error)} (see {TRACEBACK})"
    Job(folder, overrides, reason).write()
    _say(folder, reason)
    return None


def _train(composed: Any, folder: Path, answer: "Answer") -> None:
    from photon.config.compose import configured
    from photon.engine.start import start
    from photon.preflight import preflight, preflight_file
    from photon.state.checkpoint import CheckpointStore

    resume = bool(CheckpointStore(folder / "checkpoints").rounds())
    config = preflight_file(folder / "config.yaml") if resume else preflight(configured(composed))
    start(config.model_copy(update={"run_dir": str(folder)}), answer, resume=resume)


def _say(folder: Path, words: str) -> None:
    Console(stderr=True).print(f"photon: {folder}: {words}", soft_wrap=True, markup=False, highlight=False)
