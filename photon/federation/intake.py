"""What the replies of a round pass before they are folded: they are judged, and wait if they must."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from photon.federation.exchange import Failure
from photon.federation.failures import Failures
from photon.federation.requests import Sent
from photon.federation.round_events import RoundEvents, Traffic
from photon.federation.secure import SecureSum
from photon.federation.sizes import Plausibility, Sizes
from photon.federation.spool import Spool
from photon.link.messages import TrainReport
from photon.link.update import subtract
from photon.state.checkpoint import Checkpoint
from photon.strategy.base import Reply, StateGroups


@dataclass
class Collected:
    """What the replies of a round brought beside their tensors.

    Attributes
    ----------
    reports
        Of each participant whose reply is folded.
    arrivals
        Seconds after which each reply was there.
    traffic
        Bytes of all of them.
    sizes
        How large each reply is, as `photon.federation.sizes` has it.
    rejected
        Participants whose reply was rejected.
    """

    reports: dict[str, TrainReport] = field(default_factory=dict)
    arrivals: dict[str, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    sizes: dict[str, Sizes] = field(default_factory=dict)
    rejected: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Intake:
    """What the answers of a round pass on their way to the fold.

    Attributes
    ----------
    sent, collected
        What went out, and what replies bring beside their tensors.
    failures, events
        Where failures are counted, and where both are told.
    judge
        Whether sizes are plausible.
    spool
        Where replies wait.
    secure
        What masked updates were added to; None: nothing is masked.
    foldable
        Makes of a reply what the strategy folds; None: it folds what comes.
    holds
        Whether the strategy looks at all replies together.
    """

    sent: Sent
    collected: Collected
    failures: Failures
    events: RoundEvents
    judge: Plausibility
    spool: Spool
    secure: SecureSum | None
    foldable: Callable[[Reply], Reply] | None
    holds: bool

    def replies(self, answers: Iterator[tuple[str, Reply | Failure]]) -> Iterator[Reply]:
        """Yield the replies that count.

        One that is as large as earlier ones were is folded at once, in cohort order. All others wait until
        every reply is in, or late, are then judged beside each other, and come last, in cohort order, too: in
        the first round all, later hardly any. So the order depends on what came and not on when.

        Under secure aggregation none of them is known by itself: all are yielded at the end, each with the
        mean of all, or the first with the sums of all.
        """
        waiting: dict[str, Reply] = {}
        for name, answer in answers:
            if isinstance(answer, Failure):
                self._fail(name, answer)
            elif self.secure is None and self.judge.at_once(self.collected.sizes[name]):
                yield self._accepted(answer)
            else:
                waiting[name] = self.spool.keep(answer)
            del answer
        sizes = {name: self.collected.sizes[name] for name in waiting}
        # Those who were accepted at once are beside them, too: the median is that of the round.
        others = {name: self.collected.sizes[name] for name in self.collected.reports}
        for name, problem in self.judge.problems({**others, **sizes}).items():
            if waiting.pop(name, None) is not None:
                self._fail(name, Failure("rejected", problem))
        if self.secure is not None:
            waiting = self._opened(self.secure, waiting)
        for name in list(waiting):
            yield self._accepted(waiting.pop(name), waited=True)
        self.spool.emptied()

    @staticmethod
    def _opened(secure: SecureSum, waiting: Mapping[str, Reply]) -> dict[str, Reply]:
        """Return masked replies with what was unmasked of all of them together."""
        opened = secure.opened()
        if secure.opens_sums:
            groups: StateGroups = {}
            for key, tensor in opened.items():
                group, _, name = key.rpartition("/")
                groups.setdefault(group, {})[name] = tensor
            # Added up once, whoever brings them.
            first, *others = waiting.items()
            return {first[0]: replace(first[1], groups=groups), **dict(others)}
        secure.check_norm(opened, {name: reply.report for name, reply in waiting.items()})
        # Of each the mean of all, whose mean it is; beside what it has sent without a mask.
        return {
            name: replace(reply, update={**opened, **(reply.update or {})}) for name, reply in waiting.items()
        }

    def _fail(self, name: str, failure: Failure) -> None:
        if failure.kind == "rejected":
            self.collected.rejected.add(name)
        self.failures.add(name, failure)

    def _accepted(self, reply: Reply, *, waited: bool = False) -> Reply:
        down = self.sent.down[reply.participant]
        self.collected.reports[reply.participant] = reply.report
        self.collected.traffic.add(reply, *down)
        self.events.silo_finished(reply, *down)
        folded = reply if self.foldable is None else self.foldable(reply)
        # One that has waited lies in the spool already, unless something else was made of it.
        return self.spool.keep(folded) if self.holds and not (waited and folded is reply) else folded


def as_parameters(reply: Reply, checkpoint: Checkpoint) -> Reply:
    """Turn a reply's update into parameters, for a strategy that folds those."""
    if reply.update is None:
        return reply
    sent = checkpoint.load_params()
    params = {key: subtract(sent[key], delta) for key, delta in reply.update.items()}
    return replace(reply, update=None, groups={**reply.groups, "params": params})
