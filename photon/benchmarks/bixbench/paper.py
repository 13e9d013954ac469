"""What the paper and its repository report, to stand beside one's own figures; none of it was made here."""

from dataclasses import dataclass

from photon.benchmarks.bixbench.choices import Regime


@dataclass(frozen=True)
class PaperRow:
    """Accuracies of one model.

    Attributes
    ----------
    read
        Whether they were read from a figure, to about ±0.002, and not given as numbers.
    """

    version: str
    mode: str
    model: str
    accuracy: dict[Regime, float]
    read: bool


def _row(version: str, mode: str, model: str, values: tuple[float, float, float]) -> PaperRow:
    names: tuple[Regime, ...] = ("open", "mcq-refusal", "mcq")
    return PaperRow(version, mode, model, dict(zip(names, values, strict=True)), read=mode == "agent")


ROWS = (
    _row("1.5", "agent", "gpt-4o", (0.157, 0.207, 0.327)),
    _row("1.5", "agent", "Claude 3.5 Sonnet", (0.218, 0.248, 0.401)),
    _row("1.5", "zero-shot", "gpt-4o", (6 / 205, 8 / 205, 74 / 205)),
    _row("1.5", "zero-shot", "Claude 3.5 Sonnet", (6 / 205, 17 / 205, 70 / 205)),
    _row("1.0", "agent", "gpt-4o", (0.090, 0.137, 0.284)),
    _row("1.0", "agent", "Claude 3.5 Sonnet", (0.169, 0.190, 0.319)),
    _row("1.0", "zero-shot", "gpt-4o", (27 / 296, 32 / 296, 95 / 296)),
    _row("1.0", "zero-shot", "Claude 3.5 Sonnet", (34 / 296, 41 / 296, 100 / 296)),
)
