"""The keys of an adapter: what is trained beside a model that stays as it is."""

from typing import Annotated

from pydantic import Field, StringConstraints

from photon.config.section import Section

#: Part of a module's name. It is compared, and never read as an expression.
ModuleName = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.]+$")]


class AdapterSection(Section):
    """LoRA (2106.09685): beside a matrix W, which stays, alpha/rank · B A is trained; B begins with zeros."""

    rank: int = Field(16, ge=1, description="Rows of A, and columns of B.")
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="B · A counts alpha / rank times.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of A's inputs that are dropped in training.")
    target_modules: list[ModuleName] | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="Linear layers that get one, by the ends of their names, as in `[q_proj, v_proj]`; null: "
        "all but the output layer.",
    )
