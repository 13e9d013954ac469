"""One exchange with a cohort: push, then pull replies one at a time until all are in or time is up."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from photon.errors import LostError, PhotonError, RefusedError
from photon.link.bounded import one_line
from photon.link.joined import Joiner, crosses_superlink, part
from photon.link.records import count_bytes

#: Replies that arrive before their turn are held up to this many bytes; beyond it they wait in the SuperLink.
HELD_BYTES = 256 * 2**20

#: Seconds that Flower keeps a message when rounds have no deadline.
NO_DEADLINE_TTL = 7 * 86400.0

#: Characters of why an answer does not count.
MAX_REASON = 1000

FailureKind = Literal["error", "rejected", "refused", "deadline", "unavailable"]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Failure:
    """Why a participant's answer does not count: one line, of printable characters alone."""

    kind: FailureKind
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", one_line(self.reason, MAX_REASON))


@dataclass(frozen=True)
class StragglerTimeout:
    """An end of the wait before the deadline.

    Attributes
    ----------
    seconds
        After which a missing reply counts as a failure.
    may_fail
        Failures up to which it holds. For a reply that the round cannot do without, the server waits until
        the deadline.
    reason
        How ``seconds`` came about, for the reader of the failure.
    """

    seconds: float
    may_fail: int
    reason: str


def time_to_live(deadline: float | None) -> float:
    """Return for how many seconds Flower keeps a message: longer than a deadline, which is ours to tell."""
    return 2 * deadline + 600 if deadline else NO_DEADLINE_TTL


def exchange(
    grid: Grid,
    messages: dict[str, Message],
    receive: Callable[[str, Message], Answer | Failure],
    *,
    deadline: float | None,
    straggler_timeout: StragglerTimeout | None = None,
    again: Callable[[str], Message] | None = None,
    reply_bytes: int = 0,
) -> Iterator[tuple[str, Answer | Failure]]:
    """Send one message to each participant at once, and yield the answers in the order of ``messages``.

    That order, not the order of arrival, is what makes a fold reproducible. A reply that comes early is
    received at once and held until its turn, as long as the held replies stay small; large ones stay in
    the SuperLink until it is their turn, so that the server holds one of them at a time.

    Parameters
    ----------
    messages
        Participant to message, in cohort order. Emptied as they are sent, so that no copy of the model
        stays behind.
    receive
        Turns a reply that carries no error into an answer or a failure. Called once per reply, on arrival. A
        PhotonError that it raises is a failure, too.
    deadline
        Seconds after which missing replies count as failures; None waits for ever.
    straggler_timeout
        An earlier end of the wait; None: the deadline alone.
    again
        Returns the message to a participant with all that the first one left out because the participant was
        to have it. Called once for one that says that it has lost it; None: that is a failure.
    reply_bytes
        How large a reply may be, where it is larger than what was sent.
    """
    expected_bytes = max((count_bytes(message.content) for message in messages.values()), default=0)
    joiner = Joiner()
    pushed = {participant: _push(grid, messages.pop(participant), joiner) for participant in list(messages)}
    may_hold = HELD_BYTES // max(1, expected_bytes, reply_bytes)
    resend = _Resend(grid, again)
    return _answers(grid, pushed, receive, may_hold, time.monotonic(), deadline, straggler_timeout, resend)


def _push(grid: Grid, message: Message, joiner: Joiner) -> str | None:
    """Send a message and return its id; None: it was not delivered."""
    if crosses_superlink(message.content):
        message.content = joiner.join(message.content)
    # One at a time: Flower's in-memory grid leaves out the ids of messages it could not store.
    return next((identifier for identifier in grid.push_messages([message]) if identifier), None)


class _Resend:
    """Sends a participant its message again, once, if it has lost what was left out of it."""

    def __init__(self, grid: Grid, again: Callable[[str], Message] | None) -> None:
        self._grid = grid
        self._again = again
        self._done: set[str] = set()

    def __call__(self, participant: str) -> str | None:
        """Return the id of the new message; None: there is none."""
        if self._again is None or participant in self._done:
            return None
        self._done.add(participant)
        return _push(self._grid, self._again(participant), Joiner())


def _answers(
    grid: Grid,
    pushed: Mapping[str, str | None],
    receive: Callable[[str, Message], Answer | Failure],
    may_hold: int,
    begin: float,
    deadline: float | None,
    straggler_timeout: StragglerTimeout | None,
    resend: _Resend,
) -> Iterator[tuple[str, Answer | Failure]]:
    """Yield the answers to messages by their ids; one without an id was not delivered."""
    waiting = {
        participant: identifier for participant, identifier in pushed.items() if identifier is not None
    }
    answers: dict[str, Answer | Failure] = {
        participant: Failure("unavailable", "the message could not be delivered")
        for participant, identifier in pushed.items()
        if identifier is None
    }

    def poll(participant: str) -> bool:
        # A function of its own, so that no reply stays alive in the frame of the suspended generator.
        moved = False
        for reply in grid.pull_messages([waiting[participant]]):
            # An error may come from node 1, the SuperLink; the message id says whose it is.
            moved = True
            try:
                answers[participant] = _accept(participant, reply, receive)
            except LostError as error:
                identifier = resend(participant)
                if identifier is not None:
                    waiting[participant] = identifier
                    return True
                answers[participant] = Failure("error", str(error))
        if moved:
            del waiting[participant]
        return moved

    failures = 0
    for turn in pushed:
        while turn not in answers:
            moved = poll(turn)
            if not moved:
                for participant in list(waiting):
                    if participant != turn and len(answers) < may_hold:
                        moved |= poll(participant)
            if moved:
                continue
            elapsed = time.monotonic() - begin
            failed = failures + sum(isinstance(answer, Failure) for answer in answers.values())
            late = _late(
                elapsed,
                deadline,
                straggler_timeout if straggler_timeout and failed < straggler_timeout.may_fail else None,
            )
            if late:
                del waiting[turn]
                answers[turn] = Failure("deadline", late)
            else:
                time.sleep(min(0.5, max(0.02, 0.02 * elapsed)))
        failures += isinstance(answers[turn], Failure)
        yield turn, answers.pop(turn)


def _late(elapsed: float, deadline: float | None, straggler_timeout: StragglerTimeout | None) -> str | None:
    """Return why a reply that is missing after ``elapsed`` seconds is too late, or None if it is not."""
    if deadline is not None and elapsed > deadline:
        return f"no reply within {deadline:g} s (federation.deadline)"
    if straggler_timeout is not None and elapsed > straggler_timeout.seconds:
        return f"no reply within {straggler_timeout.seconds:.3g} s ({straggler_timeout.reason})"
    return None


def _accept(
    participant: str, reply: Message, receive: Callable[[str, Message], Answer | Failure]
) -> Answer | Failure:
    if reply.has_error():
        reason = reply.error.reason or f"error code {reply.error.code}"
        # Flower's code 5 is a node that went away; every other code is the app's own failure.
        return Failure("unavailable" if reply.error.code == 5 else "error", reason)
    try:
        reply.content = part(reply.content)
        return receive(participant, reply)
    except RefusedError as error:
        return Failure("refused", str(error))
    except LostError:
        raise
    except PhotonError as error:
        return Failure("rejected", str(error))
    except MemoryError:
        return Failure("rejected", "its reply takes more memory than there is")
    except (RecursionError, OverflowError, ValueError) as error:
        # Whatever the answer holds, it costs the answer and not the run.
        return Failure("rejected", f"its answer cannot be read ({type(error).__name__}: {error})")
