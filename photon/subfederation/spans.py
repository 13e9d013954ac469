"""Which rounds of its own a federation trains for each order of the one above: ``assignments.json``."""

import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from photon.files.atomic import write_text
from photon.link.messages import TrainOrder
from photon.state.checkpoint import CheckpointStore


class Span(BaseModel):
    """Where a round of the federation above began and ended, in own rounds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    model_id: str
    begins: int
    ends: int


class _Noted(BaseModel):
    """Rounds of the federation above, and how many orders of it were followed."""

    model_config = ConfigDict(extra="forbid")

    rounds: dict[int, Span] = {}
    orders: int = 0


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
    """

    def __init__(self, run_dir: Path, checkpoints: CheckpointStore, rounds: int) -> None:
        self._run_dir = run_dir
        self._file = run_dir / "assignments.json"
        self._checkpoints = checkpoints
        self._rounds = rounds

    @property
    def orders(self) -> int:
        """How many orders were followed."""
        return self._noted().orders

    def of(self, order: TrainOrder) -> tuple[Span, bool]:
        """Return the own rounds that an order means, and whether what it goes on from is lost."""
        noted = self._noted()
        span = noted.rounds.get(order.round)
        asked = (order.run_id, order.model_id)
        if span is not None and (span.run_id, span.model_id) == asked and self.has(span.begins, or_none=True):
            return span, False
        last = noted.rounds.get(order.last_round)
        begins = last.ends if last is not None and last.run_id == order.run_id else 0
        lost = order.last_round > 0 and not (begins and self.has(begins))
        if lost or order.last_round == 0:
            # Its first round of this run, or nothing is left of the earlier ones.
            begins = 0
            self._forget()
            noted = _Noted(orders=noted.orders)
        else:
            self._checkpoints.discard_after(begins)
        self.release_file(order.round).unlink(missing_ok=True)
        span = Span(run_id=order.run_id, model_id=order.model_id, begins=begins, ends=begins + self._rounds)
        kept = {at: one for at, one in noted.rounds.items() if at < order.round}
        noted = _Noted(rounds={**kept, order.round: span}, orders=noted.orders + 1)
        write_text(self._file, noted.model_dump_json(indent=1) + "\n", flush=False)
        return span, lost

    def end_of(self, run_id: str, server_round: int) -> int:
        """Return the own round in which one of the federation above ended; 0: there is none."""
        span = self._noted().rounds.get(server_round)
        known = span is not None and span.run_id == run_id and self.has(span.ends)
        return span.ends if span is not None and known else 0

    def has_trained(self, order: TrainOrder) -> bool:
        """Tell whether the reply to an order is there already, so that `of` begins nothing anew."""
        span = self._noted().rounds.get(order.round)
        return (
            span is not None
            and (span.run_id, span.model_id) == (order.run_id, order.model_id)
            and self.has(span.begins, or_none=True)
            and self.has(span.ends)
        )

    def has(self, own_round: int, *, or_none: bool = False) -> bool:
        """Tell whether the checkpoint of an own round is there; or, for the start, that there is none yet."""
        rounds = self._checkpoints.rounds()
        return own_round in rounds or (or_none and not rounds and own_round == 0)

    def release_file(self, server_round: int) -> Path:
        """Return where what a round let out across a border is kept, until the round is begun anew."""
        return self._run_dir / f"released-{server_round:06d}.safetensors"

    def _noted(self) -> _Noted:
        try:
            return _Noted.model_validate_json(self._file.read_text())
        except (OSError, ValidationError):
            return _Noted()

    def _forget(self) -> None:
        """Remove what earlier rounds have left; the description stays."""
        for name in ("checkpoints", "silos", "assignment"):
            shutil.rmtree(self._run_dir / name, ignore_errors=True)
        for name in ("events.jsonl", "assignments.json"):
            (self._run_dir / name).unlink(missing_ok=True)
