"""The configuration of a federation within another one: what its node sets, and what it takes from above."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from photon.config.compose import compose
from photon.config.schema import Component, LinkSection, PrivacySection, RunConfig
from photon.config.tree import TreeNode, plain_tree
from photon.errors import PhotonError
from photon.federation.secure import threshold_of
from photon.silo.site import SiloSite
from photon.strategy.base import strategy_of
from photon.telemetry import log
from photon.training.schedule import resolve_schedule


def member_config(
    config: RunConfig, node: TreeNode, run_dir: Path, site: SiloSite, below: Mapping[str, Any]
) -> RunConfig:
    """Return the configuration of a federation within another one.

    What the node does not set is as above. The learning-rate schedule is that of the federation above, whose
    global step its rounds count on from.
    """
    above = config.federation
    rounds = node.rounds or above.inner_rounds
    federation = above.model_copy(
        update={
            "engine": "inprocess",
            "tree": plain_tree(node) or None,
            "server_silo": node.data,
            "parent": f"{above.parent}/{node.name}" if above.parent else node.name,
            "deadline": node.deadline,
            "quorum": node.quorum or 1,
            "silos": None,
            "straggler_timeout_factor": None,
            "max_failures": None,
            **below,
        }
    )
    schedule = resolve_schedule(config.schedule.as_mapping(), config.total_steps, config.training.batch_size)
    telemetry = config.telemetry.model_copy(
        update={
            # Those of the run above are not installed here, perhaps.
            "listeners": [Component.model_validate({"_target_": f"{log.__name__}.{log.event_log.__name__}"})],
            "display": "none",
            "report": False,
            "export": False,
            "sample_tokens": 0,
            "wandb": config.telemetry.wandb.model_copy(update={"mode": "off"}),
        }
    )
    # A request may be given again for any round that the federation above can go back to. It is above that a
    # model is evaluated.
    every = config.checkpoint.permanent_every
    kept = config.checkpoint.model_copy(
        update={
            "keep": rounds * config.checkpoint.keep + 1,
            "permanent_every": None if every is None else rounds * every,
            "keep_best": False,
        }
    )
    return config.model_copy(
        update={
            "run_dir": str(run_dir),
            "data": config.data.model_copy(update={"path": str(site.data)}),
            # The store of the federation above is where that one reaches it.
            "link": _own_link(config.link, site) if below else config.link,
            "cohort": node.cohort,
            "rounds": config.rounds * rounds,
            "schedule": Component.model_validate(schedule),
            "federation": federation,
            "telemetry": telemetry,
            "checkpoint": kept,
            **node_sections(config, node),
        }
    )


def _own_link(link: LinkSection, site: SiloSite) -> LinkSection:
    store = link.store.model_copy(update={"url": site.store, "presigned": False})
    return link.model_copy(update={"store": store, "transport": "auto" if site.store else "inline"})


def node_sections(config: RunConfig, node: TreeNode) -> dict[str, Any]:
    """Return the sections of the configuration that a node sets for its own rounds.

    Raises
    ------
    PhotonError
        If it names a file of ``conf/`` that is not there, or a key that is unknown.
    """
    sections: dict[str, Any] = {}
    if isinstance(node.outer, dict) and "_target_" not in node.outer:
        raise PhotonError(
            "outer: has no _target_; write the whole section, or the name of a file in conf/outer"
        )
    if node.outer is not None:
        sections["outer"] = (
            compose([f"outer={node.outer}"]).outer
            if isinstance(node.outer, str)
            else Component.model_validate(node.outer)
        )
    if node.link is not None:
        sections["link"] = (
            compose([f"link={node.link}"]).link
            if isinstance(node.link, str)
            else LinkSection.model_validate({**config.link.model_dump(by_alias=True), **node.link})
        )
    if node.strategy is not None:
        sections["strategy"] = Component.model_validate({**config.strategy.as_mapping(), **node.strategy})
    return sections


def check_participants(rules: RunConfig, privacy: PrivacySection, node: TreeNode) -> None:
    """Check that a node has as many participants as its rounds take.

    Parameters
    ----------
    rules
        The run's configuration with the sections that the node sets.
    privacy
        Of the run: what a node sets itself is for what it sends.
    node
        The node.

    Raises
    ------
    PhotonError
        If it has too few for its quorum, its fold or a masked sum.
    """
    children = len(node.children)
    most = min(node.cohort or children, children) + (node.data is not None)
    if node.quorum is not None and node.quorum > most:
        raise PhotonError(f"quorum={node.quorum} is larger than the {most} that train in a round; lower it")
    if not node.children:
        return
    least = strategy_of(rules).least_cohort
    if least > most:
        raise PhotonError(
            f"strategy.fold.liars: needs {least} participants in a round, and there are {most}; lower it, or "
            "set another fold in the node's strategy"
        )
    if privacy.secure_aggregation:
        threshold_of(privacy, most)
