"""The stations that every round of a run passes through, put together once."""

from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import Grid

from photon.components import build
from photon.config.folders import photon_home
from photon.config.schema import RunConfig
from photon.federation.admission import Admission
from photon.federation.evaluation import Evaluation
from photon.federation.exchange import time_to_live
from photon.federation.names import ADMITTED, Names
from photon.federation.once import SentOnce
from photon.federation.requests import RequestWriter
from photon.federation.roster import Roster
from photon.federation.round_events import RoundEvents
from photon.federation.spool import REPLIES, Spool
from photon.link.transport import ServerLink
from photon.strategy.base import Strategy
from photon.telemetry.events import EventStream


@dataclass(frozen=True)
class Stations:
    """What the rounds of a run are made of.

    Attributes
    ----------
    config
        The run's configuration.
    grid
        Where the nodes are.
    strategy
        Says who gets which state groups, and how replies are folded.
    roster
        Knows which silos are online.
    link
        Encodes and decodes state groups.
    requests
        Writes what a cohort is asked.
    admission
        Judges what comes back.
    evaluation
        Lets silos evaluate a model.
    events
        Tells what happens.
    spool
        Where replies wait for others.
    """

    config: RunConfig
    grid: Grid
    strategy: Strategy
    roster: Roster
    link: ServerLink
    requests: RequestWriter
    admission: Admission
    evaluation: Evaluation
    events: RoundEvents
    spool: Spool

    @classmethod
    def of(
        cls, config: RunConfig, sent: RunConfig, grid: Grid, run_dir: Path, stream: EventStream
    ) -> "Stations":
        """Put the stations of a run together; ``sent`` is its configuration as nodes get it.

        Raises
        ------
        PhotonError
            If the strategy or the store is refused.
        """
        strategy: Strategy = build(config.strategy.as_mapping(), "strategy", config)
        seconds = time_to_live(config.federation.deadline)
        link = ServerLink(config.link_in_use, run_dir, seconds)
        once = SentOnce(config)
        events = RoundEvents(config, stream)
        admission = Admission(config, link)
        deployed = config.federation.engine == "deployment"
        names = Names(run_dir, photon_home() / ADMITTED) if deployed else None
        roster = Roster(grid, sent, admission, names, lambda text: events.notice("warning", text))
        return cls(
            config=config,
            grid=grid,
            strategy=strategy,
            roster=roster,
            link=link,
            requests=RequestWriter(config, strategy, link, roster, once),
            admission=admission,
            evaluation=Evaluation(
                grid, roster, link, admission, events, once, warm=bool(config.model.warm_start)
            ),
            events=events,
            spool=Spool(run_dir / REPLIES),
        )
