"""The fields of a ``transformers`` configuration: their names, which Photon sets, and how they travel.

Many a field has two names: the one that a class declares and one that its ``attribute_map`` gives, by which
it may be kept and written. Whatever is looked for here is found under either.
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from photon.components import nearest
from photon.config.floats import tagged
from photon.errors import PhotonError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: What transformers takes to fetch code or weights by; no field of a model of Photon's.
_FETCHING = re.compile(
    r"auto_map|implementation|quantization_config|trust_remote|name_or_path|_class|backbone"
)
#: Marks fields that transformers has written down, with all that it derives.
WRITTEN = "transformers_version"

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# How a file's field must look like a known one to be taken for a misspelling of it.
_MISSPELT = 0.85
#: Every configuration takes these, and no class declares them.
_UNDECLARED = {"per_layer_config"}
#: Types that count positions from behind the padding's id, which they cannot do without.
COUNTED_FROM_PADDING = {
    "camembert",
    "data2vec-text",
    "prophetnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
#: Types that find the end of a text by the padding in it, or pad texts themselves.
_ENDED_BY_PADDING = {"reformer", "xlm"}


class Fields:
    """The fields of a configuration that is to be built.

    Parameters
    ----------
    kind
        Class of the configuration.
    values
        Field to value, under whatever names.
    """

    def __init__(self, kind: Any, values: Mapping[str, Any]) -> None:
        self._kind = kind
        self.values = dict(values)
        self._declared = {field.name: field.type for field in dataclasses.fields(kind)}
        aliases: Mapping[str, str] = kind.attribute_map
        self.known = {*self._declared, *aliases, *aliases.values(), *_UNDECLARED}

    def has(self, name: str) -> bool:
        """Return whether the type has such a field."""
        return name in self.known

    def get(self, name: str) -> Any:
        """Return the value of a field; None: it is not set."""
        # What a class does not declare is set last, so it counts.
        names = sorted(self._names(name), key=lambda one: one not in self._declared)
        return self.values[names[-1]] if names else None

    def put(self, name: str, value: Any) -> None:
        """Set a field, whatever its name was."""
        for other in self._names(name):
            del self.values[other]
        # What is derived from a field while the configuration is built looks at the declared name.
        own = self._kept_as(name)
        self.values[next((one for one in self._declared if self._kept_as(one) == own), own)] = value

    def check(self, where: str, *, strict: bool) -> None:
        """Refuse fields that transformers would swallow without a word.

        A file from elsewhere may carry fields of older versions, so there only what looks like a misspelling
        of a field that is not set is refused.

        Parameters
        ----------
        strict
            Whether every unknown field is refused.
        """
        if not set(self.values) - self.known:
            return
        known = self.known | self._derived()
        for name in self.values:
            if name in known:
                continue
            if strict:
                raise PhotonError(f"{where}.{name}: unknown field{nearest(name, known)}")
            unset = sorted(one for one in self.known if not self._names(one))
            if close := difflib.get_close_matches(name, unset, n=1, cutoff=_MISSPELT):
                raise PhotonError(f"{where}: unknown field '{name}'; did you mean '{close[0]}'?")

    def leave_tokens_open(self, model_type: str, tokens: int, rows: int) -> None:
        """Leave special tokens to the tokenizer, as far as the type can do without them.

        Parameters
        ----------
        tokens, rows
            Entries of the tokenizer, and rows of the embedding.
        """
        for name in _TOKEN_IDS:
            if not self.has(name):
                continue
            given, is_padding = self.get(name), name == "pad_token_id"
            counted = is_padding and model_type in COUNTED_FROM_PADDING
            ended = is_padding and model_type in _ENDED_BY_PADDING
            if self._may_be_none(name) and not counted and not ended:
                self.put(name, None)
                continue
            if given is None and counted:
                given = self._default(name)
            fits = isinstance(given, int) and 0 <= given < rows
            # The last row is no token's where there are more rows than tokens.
            self.put(name, given if fits and not (ended and rows > tokens) else rows - 1)

    def positions_before(self, model_type: str) -> int:
        """Return how many positions lie before that of the first token."""
        padding = self.get("pad_token_id")
        return int(padding) + 1 if model_type in COUNTED_FROM_PADDING and padding is not None else 0

    def _names(self, name: str) -> list[str]:
        """Return the names under which a field is set."""
        own = self._kept_as(name)
        return [one for one in self.values if self._kept_as(one) == own]

    def _kept_as(self, name: str) -> str:
        return str(self._kind.attribute_map.get(name, name))

    def _default(self, name: str) -> Any:
        fields = {field.name: field.default for field in dataclasses.fields(self._kind)}
        return fields.get(name)

    def _may_be_none(self, name: str) -> bool:
        kind = self._declared.get(name)
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            return type(None) in typing.get_args(kind)
        return kind is None or kind is Any

    def _derived(self) -> set[str]:
        """Return what the type writes down beside its fields."""
        try:
            own = self._kind(**{name: value for name, value in self.values.items() if name in self.known})
        except Exception:  # it is built again, and then what is wrong is said
            return set()
        return set(own.to_dict())


def written(config: "PreTrainedConfig") -> dict[str, Any]:
    """Return a configuration as the fields of its ``config.json``, without what code or weights come by.

    Whatever else transformers writes is in it, derived fields and those of other versions too: a model may
    look at any of them.
    """
    fields = json.loads(config.to_json_string())
    return {"model_type": config.model_type} | _without_fetching(fields)


def difference(one: "PreTrainedConfig", other: "PreTrainedConfig") -> list[str]:
    """Return the names of fields in which two configurations differ, apart from what `written` leaves out."""
    fields, others = (_without_fetching(tagged(config.to_dict())) for config in (one, other))
    return sorted(name for name in {*fields, *others} if fields.get(name) != others.get(name))


def is_fetching(name: Any, value: Any) -> bool:
    """Return whether code or weights may be fetched by a field, or a file read."""
    if value and _FETCHING.search(str(name)):
        return True
    return isinstance(value, str) and ("/" in value or "\\" in value)


def _without_fetching(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): _plain(name, value) for name, value in fields.items() if not is_fetching(name, value)}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _without_fetching(value)
    if isinstance(value, list):
        return [_plain(name, inner) for inner in value if not is_fetching(name, inner)]
    return value
