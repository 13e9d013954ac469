"""Say which runs of two recordings are alike, and where the others first differ."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.golden.reading import Record, ending
from tests.golden.record import Recording

#: What comes first in a round, so that the first difference is the nearest to its cause.
_ORDER = [
    r": run_started|: round_started",
    r": silo_",
    r"(optimizer|link|reply|state) ",
    r": round_finished",
    r": (params|outer|averaged|kept|reference|checkpoint)",
]


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one run."""

    run: str
    equal: bool
    text: str

    def __str__(self) -> str:
        return f"{self.run:32} {self.text}"


def compare(
    base: Recording, present: Recording, names: Sequence[str], ends_as: Mapping[str, str]
) -> list[Verdict]:
    """Compare two recordings, run by run.

    Parameters
    ----------
    names
        The runs that must be in both.
    ends_as
        Run to another one, with whose end its own must agree where both were recorded.
    """
    verdicts = []
    for name in names:
        problem = _problem(base, present, name)
        other = ends_as.get(name)
        if problem is None and other in present.records:
            wanted, own = ending(present.records[other]), ending(present.records[name])
            found = difference({"end": wanted}, {"end": own})
            problem = found and f"DOES NOT END AS {other}: {found}"
        figures = sum(len(part) for part in base.records.get(name, {}).values())
        verdicts.append(Verdict(name, problem is None, problem or f"equal in {figures} figures"))
    return verdicts


def _problem(base: Recording, present: Recording, name: str) -> str | None:
    for side, recording in (("base", base), ("present", present)):
        if name in recording.failed:
            return f"FAILED with the {side} code: {recording.failed[name]}"
        if not recording.records.get(name):
            return f"MISSING from the recording of the {side} code"
    found = difference(base.records[name], present.records[name])
    return found and f"DIFFERS in {found}"


def difference(base: Record, present: Record) -> str | None:
    """Return how many figures differ and which one is the first, or None."""
    different = [
        (part, figure)
        for part in dict.fromkeys([*base, *present])
        for figure in dict.fromkeys([*base.get(part, {}), *present.get(part, {})])
        if base.get(part, {}).get(figure) != present.get(part, {}).get(figure)
    ]
    if not different:
        return None
    first = different[0][0]
    figure = min((figure for part, figure in different if part == first), key=_rank)
    values = [_shown(record.get(first, {}).get(figure)) for record in (base, present)]
    return f"{len(different)} figures, first in {first}: {figure}: base {values[0]}, present {values[1]}"


def _shown(value: str | None) -> str:
    """Shorten hashes; floats stay whole."""
    if value is None:
        return "nothing"
    return f"{value[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", value) else value


def _rank(figure: str) -> tuple[int, str]:
    ranks = (rank for rank, pattern in enumerate(_ORDER) if re.search(pattern, figure))
    return next(ranks, len(_ORDER)), figure
