"""What is counted of a silo's text, on the silo's own disk, before a request is carried out."""

from collections.abc import Mapping
from dataclasses import replace

from photon.config.schema import RunConfig
from photon.link.messages import TrainRequest
from photon.silo.policy import Cost
from photon.silo.site import SiloSite
from photon.silo.work import idle_steps
from photon.state.places import Place, chosen, updates_since
from photon.state.silo import SiloCounts, counting


def count_use(
    request: TrainRequest, costs: Mapping[str, Cost], site: SiloSite, config: RunConfig, *, told: bool
) -> None:
    """Judge what a request does with the text of each silo, and count it.

    It is counted before the node works, so a crash counts twice, and never not at all.

    Parameters
    ----------
    costs
        Silo to what is done with its text.
    told
        Whether the place where it begins is the aggregator's word, and not the node's own.

    Raises
    ------
    RefusedError
        If it goes beyond a limit for one of them; it then counts for none.
    PhotonError
        If a count cannot be read or written.
    """
    reader, policy = "+".join([request.silo, *request.members]), site.policy
    with counting(site.state):
        for silo, most in costs.items():
            cost = replace(most, idle=idle_steps(config, request.global_step, most.steps))
            uses = SiloCounts(site.state, silo).used()
            policy.check_cost(silo, cost, sum(use.tokens for use in uses.values()))
            places = {run: use.places for run, use in uses.items()}
            updates = sum(use.releases for use in uses.values())
            place = Place(reader, cost.start, cost.start + cost.windows, updates)
            if told:
                problem = chosen(place, places.get(request.run_id), remembers=bool(uses))
                policy.check_place(silo, problem)
            policy.check_repeat(silo, updates_since(place, request.run_id, places))
        for silo, cost in costs.items():
            place = Place(reader, cost.start, cost.start + cost.windows)
            counts = SiloCounts(site.state, silo)
            counts.add(request.run_id, cost.tokens, cost.releases, place, flush=not site.simulated)
