"""Which rounds of its own a federation trains for each order of the one above: ``assignments.json``."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from photon.config.renamed import renamed
from photon.files.atomic import remove_directory, remove_leftovers, write_text
from photon.link.messages import TrainRequest
from photon.state.checkpoint import CheckpointStore
from photon.subfederation.kept import KeptReplies


class Span(BaseModel):
    """Where a round of the federation above began and ended, in own rounds.

    Attributes
    ----------
    windows
        Windows that the requests until its end asked of a silo; None: an earlier Photon has not noted them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    model_id: str
    begins: int
    ends: int
    windows: int | None = None


class _Noted(BaseModel):
    """Rounds of the federation above, and how many orders of it were followed."""

    model_config = ConfigDict(extra="forbid")

    rounds: dict[int, Span] = {}
    requests: int = 0


class Spans:
    """The spans of a federation's run folder, and whether their checkpoints are there.

    Parameters
    ----------
    run_dir
        Run folder of the federation.
    checkpoints
        Those of its own rounds.
    rounds
        Own rounds for each round of the federation above.

    Attributes
    ----------
    rounds
        As above.
    kept
        What is kept of its replies.
    """

    def __init__(self, run_dir: Path, checkpoints: CheckpointStore, rounds: int) -> None:
        self._run_dir = run_dir
        self._file = run_dir / "assignments.json"
        self._checkpoints = checkpoints
        self.rounds = rounds
        self.kept = KeptReplies(run_dir)

    @property
    def requests(self) -> int:
        """How many requests were followed."""
        return self._noted().requests

    def of(self, request: TrainRequest) -> tuple[Span, bool]:
        """Return the own rounds that a request means, and whether what it goes on from is lost."""
        noted = self._noted()
        span = noted.rounds.get(request.round)
        asked = (request.run_id, request.model_id)
        if span is not None and (span.run_id, span.model_id) == asked and self.has(span.begins, or_none=True):
            return span, False
        last = noted.rounds.get(request.last_round)
        begins = last.ends if last is not None and last.run_id == request.run_id else 0
        lost = request.last_round > 0 and not (begins and self.has(begins))
        if lost or request.last_round == 0:
            # Its first round of this run, or nothing is left of the earlier ones.
            begins = 0
            self._forget()
            noted = _Noted(requests=noted.requests)
        else:
            self._checkpoints.discard_after(begins)
        self.kept.forget(request.round)
        span = Span(
            run_id=request.run_id,
            model_id=request.model_id,
            begins=begins,
            ends=begins + self.rounds,
            windows=self._read(last if begins else None, request) + request.steps * request.batch_size,
        )
        kept = {at: one for at, one in noted.rounds.items() if at < request.round}
        noted = _Noted(rounds={**kept, request.round: span}, requests=noted.requests + 1)
        write_text(self._file, noted.model_dump_json(indent=1) + "\n", flush=False)
        return span, lost

    def begins(self, request: TrainRequest) -> int:
        """Return the own round that a request would go on from; 0: it would begin anew."""
        last = self._last(request)
        return 0 if last is None else last.ends

    def read(self, request: TrainRequest) -> int:
        """Return the windows that requests have asked of a silo before this one; 0: it would begin anew."""
        return self._read(self._last(request), request)

    def _last(self, request: TrainRequest) -> Span | None:
        last = self._noted().rounds.get(request.last_round)
        known = last is not None and last.run_id == request.run_id and self.has(last.ends)
        return last if known and request.last_round > 0 else None

    def _read(self, last: Span | None, request: TrainRequest) -> int:
        if last is None:
            return 0
        if last.windows is not None:
            return last.windows
        # As if all of them had asked for as many as this one.
        return last.ends * request.steps * request.batch_size // self.rounds

    def end_of(self, run_id: str, server_round: int) -> int:
        """Return the own round in which one of the federation above ended; 0: there is none."""
        span = self._noted().rounds.get(server_round)
        known = span is not None and span.run_id == run_id and self.has(span.ends)
        return span.ends if span is not None and known else 0

    def has_trained(self, request: TrainRequest) -> bool:
        """Tell whether the reply to a request is there already, so that `of` begins nothing anew."""
        span = self._noted().rounds.get(request.round)
        return (
            span is not None
            and (span.run_id, span.model_id) == (request.run_id, request.model_id)
            and self.has(span.begins, or_none=True)
            and self.has(span.ends)
        )

    def has(self, own_round: int, *, or_none: bool = False) -> bool:
        """Tell whether the checkpoint of an own round is there; or, for the start, that there is none yet."""
        rounds = self._checkpoints.rounds()
        return own_round in rounds or (or_none and not rounds and own_round == 0)

    def _noted(self) -> _Noted:
        try:
            return _Noted.model_validate(renamed().content(json.loads(self._file.read_text())))
        except (OSError, ValueError, RecursionError):
            return _Noted()

    def _forget(self) -> None:
        """Remove what earlier rounds have left; the description stays."""
        for name in ("checkpoints", "silos", "assignment"):
            remove_leftovers(self._run_dir, name)
            remove_directory(self._run_dir / name)
        for name in ("events.jsonl", "assignments.json"):
            (self._run_dir / name).unlink(missing_ok=True)
        self.kept.forget(0)
