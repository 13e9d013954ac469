"""The `privacy` section of a configuration."""

from typing import Annotated

from pydantic import Field, model_validator

from photon.config.section import Section


class PrivacySection(Section):
    """What is done to a participant's update before it leaves."""

    clip_norm: float | None = Field(
        gt=0,
        description="Bound on the L2 norm of a participant's update in a round, over all parameters that it "
        "sends (C); null: none.",
    )
    noise_multiplier: float = Field(
        ge=0,
        description="Standard deviation of the Gaussian noise on each coordinate of the update, in units of "
        "`clip_norm` (z); 0: no noise.",
    )
    delta: float = Field(gt=0, lt=1, description="The δ for which the summary gives ε.")
    seed: int | None = Field(
        ge=0,
        description="Seed of the noise, for experiments alone; null: the operating system's randomness, "
        "without which there is no privacy.",
    )
    secure_aggregation: bool = Field(
        description="Silos mask their updates, so that the server learns the sum of the cohort's alone."
    )
    allow_unmasked: bool = Field(
        False,
        description="Whether what a strategy looks at one by one, such as key layers, may leave unmasked.",
    )
    threshold: int | None = Field(
        ge=2,
        description="Silos of a cohort that must answer so that the sum can be unmasked, a majority; null: "
        "two thirds.",
    )
    range: float = Field(
        gt=0,
        le=1e6,
        description="Largest magnitude of a coordinate of an update that is masked; a larger one fails.",
    )
    ranges: dict[str, Annotated[float, Field(gt=0, le=2.0**50)]] | None = Field(
        None,
        description="Largest magnitude of a value that a silo may have in a sum that is masked, by group, "
        "as in `{grams: 1e4}`; of other sums, and with null of all, it is 2^20. A larger value fails. The "
        "smaller, the finer the sum.",
    )

    alone: list[str] = Field(
        [],
        description="Sets of rows, such as `forget`, of which a masked sum may be one silo's alone, which "
        "hides nothing of it; that silo's policy has to allow it, too.",
    )

    @property
    def on(self) -> bool:
        """Whether updates are bounded before they leave."""
        return self.clip_norm is not None

    @model_validator(mode="after")
    def _possible(self) -> "PrivacySection":
        if self.secure_aggregation and self.clip_norm is not None:
            # Eight standard deviations: a coordinate beyond that comes about once in 10^15.
            needed = self.clip_norm * (1 + 8 * self.noise_multiplier)
            if self.range < needed:
                raise ValueError(
                    f"privacy.range={self.range:g}: clipped and noised coordinates reach {needed:g}; raise it"
                )
        if self.noise_multiplier > 0 and self.clip_norm is None:
            raise ValueError(
                f"privacy.noise_multiplier={self.noise_multiplier:g} is in units of privacy.clip_norm; set it"
            )
        return self
