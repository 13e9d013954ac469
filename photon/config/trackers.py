"""The sections of trackers in a configuration."""

from typing import Literal

from pydantic import Field

from photon.config.section import Section


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["off", "offline", "online"] = Field(description="off, offline (files only) or online.")
    project: str = Field(description="Project to log to.")
    entity: str | None = Field(None, description="User or team whose project it is; null: your default.")
    group: str | None = Field(None, description="Group of runs that belong together; null: none.")
    tags: list[str] = Field([], description="Tags of the run.")
    name: str | None = Field(None, description="Name of the run there; null: that of its folder.")
