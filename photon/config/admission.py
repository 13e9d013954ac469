"""The keys that say what a server accepts of the replies of a round, and of a round itself."""

from typing import Annotated, Literal

from pydantic import Field

from photon.config.section import Section

#: Seconds without a sign of life after which the other side of a standing request is taken for dead.
Lease = Annotated[float, Field(ge=2.0, le=3600.0, allow_inf_nan=False)]
StandingLease = Annotated[
    Lease | None,
    Field(
        description="Seconds without a sign of life after which a standing request is over: one message for "
        "many rounds, which go through `link.store` (deployment); null: a message for every request."
    ),
]


class AdmissionSection(Section):
    """What a reply must be to count, beside what every reply must be."""

    norm_factor: float | None = Field(
        20.0,
        gt=1,
        description="Reject an update so many times as large as is usual: as the median of its round, "
        "and of what was accepted before; null: whatever its size.",
    )
    quarantine_after: int | None = Field(
        3,
        ge=1,
        description="Rejected replies in a row after which a silo is not drawn for a while; null: never.",
    )
    quarantine_rounds: int = Field(10, ge=1, description="Rounds for which it is not drawn then.")


class GuardSection(Section):
    """What happens when a round has made the model worse on validation text."""

    action: Literal["undo", "stop", "off"] = Field(
        "undo",
        description="undo: the model is put back to what it was, suspects are named, and the run goes on; "
        "stop: the run stops before the round counts; off: nothing.",
    )
    tolerance: float = Field(
        0.5,
        gt=0,
        description="Smallest rise of the validation loss in nats, by the median of the silos, that is too "
        "much; it may be more where earlier rounds have moved the loss by more.",
    )
