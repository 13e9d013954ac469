"""The keys that make a model iterate over its middle blocks, as AbbIE does."""

from typing import Literal

from pydantic import Field

from photon.config.section import Section


class AbbieSection(Section):
    """AbbIE (2507.08567): the blocks are head, body and tail, and the body is applied several times."""

    head_blocks: int = Field(ge=0, description="Blocks before the body, applied once.")
    body_blocks: int = Field(ge=1, description="Blocks that are applied several times.")
    tail_blocks: int = Field(ge=0, description="Blocks after the body; all three add up to the model's.")
    variant: Literal["C", "D"] = Field(
        "D",
        description="C: a pass begins with what the last one made; D: what went into that is added to it.",
    )
    residual_mode: Literal["inter", "post", "input"] = Field(
        "inter",
        description="Of D. inter: between passes; post: after every pass, the first as well; input: the "
        "head's state is added to what goes into every pass but the first.",
    )
    train_iterations: int = Field(
        2, ge=1, le=64, description="Passes through the body, in training and when a run evaluates."
    )
