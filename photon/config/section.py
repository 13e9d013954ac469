"""What every section of a configuration, and of a policy, is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of keys; an unknown key or a value of the wrong type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Sources(dict[str, str]):
    """Keys whose values ``conf/`` takes from other keys, and these; no part of what a configuration is."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sources)

    __hash__ = None
