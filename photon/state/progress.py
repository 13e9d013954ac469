"""How the validation loss of a run's models has moved.

The silos themselves say how good a model is. So it is the median of what each of them says, against what it
said before: a silo that lies in its evaluation alone can undo no round, and keep none that was bad, as long
as most of them are honest.
"""

import statistics
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from photon.config.admission import GuardSection

#: A rise is too much beyond so many times what earlier rounds have moved the loss by.
FACTOR = 3.0
#: Earlier changes that count.
REMEMBERED = 10
#: Rounds in a row that are undone before one counts whatever it did: that is how this run is, then.
PATIENCE = 3


class Progress(BaseModel):
    """How the validation loss has moved, in evaluations of models that were kept.

    Attributes
    ----------
    losses
        Silo to the loss that it told of the last model.
    changes
        Medians of the silos' changes from one evaluation to the next, the last ones.
    undone
        Rounds that were undone since.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    losses: dict[str, float] = Field(default_factory=dict)
    changes: list[float] = Field(default_factory=list)
    undone: int = Field(default=0, ge=0)

    def change(self, losses: Mapping[str, float]) -> float | None:
        """Return by how much the loss has risen, by the median of the silos; None: nobody can compare."""
        changes = [loss - self.losses[silo] for silo, loss in losses.items() if silo in self.losses]
        # Of two, both must say so.
        return statistics.median_low(changes) if changes else None

    def after(self, losses: Mapping[str, float]) -> "Progress":
        """Return the progress after one more evaluation."""
        change = self.change(losses)
        changes = self.changes if change is None else [*self.changes, change][-REMEMBERED:]
        # What a silo said of an older model would hide a rise since then.
        return Progress(losses=dict(losses), changes=changes)

    def most(self, guard: GuardSection) -> float:
        """Return the largest rise that is let pass, in nats."""
        usual = statistics.median(abs(change) for change in self.changes) if self.changes else 0.0
        return max(guard.tolerance, FACTOR * usual)

    def problem(self, losses: Mapping[str, float], guard: GuardSection) -> str | None:
        """Return why a model is worse than the one before, or None."""
        rise, most = self.change(losses), self.most(guard)
        if guard.action == "off" or rise is None or rise <= most or self.undone >= PATIENCE:
            return None
        return f"the validation loss rose by {rise:.3g} nats in the median of the silos; {most:.3g} may be"
