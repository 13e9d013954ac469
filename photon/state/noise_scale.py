"""The gradient noise scale of the silos' updates."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict


class NoiseScale(BaseModel):
    """Running gradient noise scale of the silos' updates: how many silos are worth averaging.

    With b_s = 1 silo and b_b = K silos, g_s an update Δ_k and g_b their mean Δ,

        tr = (|g_s|² − |g_b|²) / (1/b_s − 1/b_b),   |G|² = (b_b |g_b|² − b_s |g_s|²) / (b_b − b_s),

    each averaged exponentially over the rounds, and the scale is tr / |G|².

    Attributes
    ----------
    trace, square
        Exponential averages of tr and |G|², not yet corrected for their start at 0.
    rounds
        Rounds averaged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    trace: float = 0.0
    square: float = 0.0
    rounds: int = 0

    def add(self, norm: float, update_norms: Sequence[float], decay: float = 0.99) -> "NoiseScale":
        """Return the average after one more round; a round of a single silo says nothing.

        Parameters
        ----------
        norm
            ‖Δ‖, the norm of the pseudo-gradient.
        update_norms
            ‖Δ_k‖ of each silo.
        decay
            Share of the old average.
        """
        silos = len(update_norms)
        if silos < 2:
            return self
        small, big = sum(update**2 for update in update_norms) / silos, norm**2
        trace = (small - big) / (1 - 1 / silos)
        square = (silos * big - small) / (silos - 1)
        return NoiseScale(
            trace=decay * self.trace + (1 - decay) * trace,
            square=decay * self.square + (1 - decay) * square,
            rounds=self.rounds + 1,
        )

    def figures(self, decay: float = 0.99) -> dict[str, float]:
        """Return ``trace`` and ``square`` corrected for their start at 0, and ``scale``, where they exist."""
        if self.rounds == 0:
            return {}
        correction = 1 - decay**self.rounds
        figures = {"trace": self.trace / correction, "square": self.square / correction}
        if self.square > 0:
            figures["scale"] = self.trace / self.square
        return figures
