"""How the benchmark is run and graded, as YAML; what the paper leaves open is a key here."""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from photon.benchmarks.bixbench.choices import REGIMES, Regime
from photon.benchmarks.notebook.sandbox import Limits
from photon.components import nearest
from photon.config.explain import explain_validation
from photon.config.reader import read_file, read_own
from photon.config.section import Section
from photon.errors import PhotonError, printable


class LimitSettings(Section):
    """What the kernel of a question may use."""

    cell_seconds: float = Field(60.0, gt=0, le=86_400, description="Time that a cell may run.")
    cpu_seconds: int = Field(600, gt=0, description="Processor time of each process.")
    memory_mib: int = Field(4096, ge=512, description="Memory of each process, and of all together.")
    disk_mib: int = Field(256, ge=1, description="What may be written in the work folder.")
    files: int = Field(10_000, ge=100, description="Files and folders that may be made.")
    processes: int = Field(64, ge=32, description="Processes and threads at one time.")
    output_kib: int = Field(8192, ge=64, description="What a cell may send.")

    def limits(self) -> Limits:
        """Return them in seconds and bytes."""
        return Limits(
            cell_seconds=self.cell_seconds,
            cpu_seconds=self.cpu_seconds,
            memory=self.memory_mib << 20,
            disk=self.disk_mib << 20,
            files=self.files,
            processes=self.processes,
            output=self.output_kib << 10,
        )


class RunSettings(Section):
    """How answers are made."""

    mode: Literal["agent", "zero-shot"] = Field(
        "agent", description="With a notebook over the capsule's data, or without data and tools."
    )
    regimes: list[Regime] = Field(list(REGIMES), min_length=1, description="Which of the three regimes.")
    replicas: int = Field(5, ge=1, le=1000, description="Answers to each question.")
    max_steps: int = Field(20, ge=1, le=1000, description="Actions of an agent for one answer.")
    max_repeats: int = Field(
        5,
        ge=0,
        le=1000,
        description="An agent that acts so often the same way in a row is stopped; 0: never.",
    )
    question_seconds: float = Field(3600.0, gt=0, description="No action begins after so long.")
    protocol: Literal["tools", "text"] = Field(
        "tools", description="How a model acts: by tool calls, or, where it knows none, by what it writes."
    )
    images: bool = Field(False, description="Whether a model is shown the notebook's images.")
    rerun: Literal["notebook", "cell"] = Field(
        "notebook", description="What runs at an edit: all cells in a new kernel, or the edited cell alone."
    )
    hide_old_states: bool = Field(
        True, description="Whether earlier states of the notebook are left out of the conversation."
    )
    shuffle_seed: int = Field(0, ge=0, description="Of the order of options, with the question's name.")
    parallel: int = Field(2, ge=1, le=64, description="Questions at the same time.")
    limits: LimitSettings = Field(LimitSettings(), description="Of each kernel.")

    def identity(self) -> dict[str, Any]:
        """Return what an answer depends on."""
        return self.model_dump(exclude={"parallel", "replicas", "regimes"})


class GradeSettings(Section):
    """How answers are graded."""

    range_grader: Literal["numeric", "judge"] = Field(
        "numeric", description="Whether a number is compared with a range first, or the judge asked at once."
    )
    partial_match: Literal["never", "words", "upstream"] = Field(
        "words",
        description="Whether a part of the ideal text is right: whole words, or as upstream any part.",
    )
    open_refusals: Literal["incorrect", "counted"] = Field(
        "incorrect", description="Whether an open answer that refuses leaves the coverage at 1."
    )
    denominator: Literal["fixed", "answered"] = Field(
        "fixed", description="Whether a question without an answer counts as wrong, or not at all."
    )
    compat: bool = Field(
        False, description="As the authors' code, with its errors; the other keys are then without effect."
    )

    def effective(self) -> "GradeSettings":
        """Return the settings with what ``compat`` stands for."""
        if not self.compat:
            return self
        return GradeSettings(
            range_grader="judge",
            partial_match="upstream",
            open_refusals="incorrect",
            denominator="answered",
            compat=True,
        )


_Settings = TypeVar("_Settings", RunSettings, GradeSettings)


def read_settings(kind: type[_Settings], file: Path | None, changes: list[str]) -> _Settings:
    """Read settings from a file, and take ``KEY=VALUE`` changes; a dot reaches into ``limits``.

    Raises
    ------
    PhotonError
        If the file cannot be read, or a key or value is wrong; the nearest valid key is named.
    """
    values: Any = {}
    where = "settings"
    if file is not None:
        where = f"settings {printable(file)}"
        try:
            values = read_file(file) or {}
        except PhotonError as error:
            raise PhotonError(f"{where}: cannot be read ({error})") from error
        if not isinstance(values, dict):
            raise PhotonError(f"{where}: expected keys and values, as in replicas: 5")
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise PhotonError(f"--set {printable(change)}: expected KEY=VALUE, as in max_steps=40")
        *above, last = key.split(".")
        inner = values
        for part in above:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            raise PhotonError(
                f"--set {printable(change)}: {printable('.'.join(above))} has no keys of its own"
            )
        inner[last] = read_own(text)
    known = set(kind.model_fields)
    for key in values:
        if key not in known:
            raise PhotonError(f"{where}: {printable(key)}: unknown key{nearest(str(key), known)}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise PhotonError(
            f"{where}: {explain_validation(error, known | set(LimitSettings.model_fields))}"
        ) from None
