"""A federation of the tree that a run names, over silos whose text lies at one node.

A node acts as one only where its operator allows that, with ``branches=true``; on the machine of whoever
started the run it always does.
"""

from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from photon.config.schema import RunConfig
from photon.config.tree import TreeNode
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.link.answer import Answer, NodeConfig
from photon.link.messages import SiloInfo, TrainRequest
from photon.silo.policy import Cost
from photon.silo.service import SiloNode
from photon.silo.site import SiloSite
from photon.subfederation.describe import describe_children
from photon.subfederation.member import Drive, Member
from photon.subfederation.service import FederationNode


class TreeSilos(SiloNode):
    """Silos at a node that also answers for the federations of a run's tree."""

    def describe(self) -> list[SiloInfo]:
        """Describe the children of the tree, silos and federations."""
        root = self.config.federation.root
        assert root is not None, "without a tree the node is one of silos"
        return describe_children(root, self.site, self.config)


class BranchNode(FederationNode):
    """A federation of a run's tree.

    Parameters
    ----------
    node
        Its place in the tree.
    site
        Where its things, and those of its silos, lie.
    config
        The configuration of the federation above.
    carry_out
        Runs its rounds.
    """

    def __init__(self, node: TreeNode, site: SiloSite, config: RunConfig, carry_out: Drive) -> None:
        super().__init__(node.name, site, config)
        self._node = node
        self._drive = carry_out

    @cached_property
    def member(self) -> Member:
        """The federation at work. Its whole update is bounded as the node's policy wants it of a silo's."""
        node, rule = self._node, self.site.policy.privacy
        if rule is not None:
            own = rule.applied_to(self.config.border_privacy(node))
            node = node.model_copy(update={"privacy": own.model_dump()})
        return Member(node, self.site, self.config, self._drive)

    @property
    def vocab_size(self) -> int:
        """Tokens that the text knows."""
        return self.site.vocab_size

    def check_asked(self, silo: str, members: list[str]) -> None:
        """Check that a request means this federation, and that all its silos live here.

        Raises
        ------
        PhotonError
            If not, or if the tree gives a node another strategy than the run's: with another one, rounds
            could take more steps than `cost` says.
        """
        super().check_asked(silo, members)
        here = self.site.prepared().silo_names
        if unknown := sorted(set(self._node.silos()) - set(here)):
            raise PhotonError(f"{self.site.data} has no silo {unknown[0]!r}: it has {', '.join(here)}")
        for node in self._node.walk():
            if "_target_" in (node.strategy or {}):
                raise PhotonError(
                    f"federation.tree: {node.name}: strategy._target_: it is the run's; remove it"
                )
        for leaf in self._node.silos():
            self.site.policy.check_stand_in(leaf, f"its text within the federation {self.name}")

    def cost(self, request: TrainRequest) -> dict[str, Cost]:
        """Return what a request does with the text of each silo: all of its rounds, each with every silo.

        Steps and batch are those of the configuration, by which a federation trains.
        """
        local_steps, batch_size = self.config.local_steps, self.config.training.batch_size
        manifest = self.site.prepared().manifest
        costs = {}
        for silo, (rounds, pace) in _rounds_below(self._node, self._node.rounds or 1).items():
            steps = rounds * pace * local_steps
            windows = steps * batch_size
            costs[silo] = self._cost(
                request,
                steps,
                windows,
                manifest.sequence_length,
                releases=rounds,
                available=manifest.silos[silo].train.sequences,
            )
        return costs


def _rounds_below(node: TreeNode, rounds: int) -> dict[str, tuple[int, int]]:
    """Return the rounds in which each silo below a node trains, and by how many times its steps are longer.

    A silo beside a federation takes as many steps in a round as the silos of that one in all of theirs.
    """
    found = {} if node.data is None else {node.data: (rounds, node.pace)}
    for child in node.children:
        if child.is_silo:
            found[child.name] = (rounds, node.pace)
        else:
            found |= _rounds_below(child, rounds * (child.rounds or 1))
    return found


def drive(node_config: NodeConfig, answer: Answer) -> Drive:
    """Return what carries out assignments of a federation of the tree: its silos answer in this process.

    They are held to what the operator of this node has set, and keep their state in the federation's folder.

    Parameters
    ----------
    answer
        Answers for a silo within.
    """

    def carry_out(config: RunConfig, resume: bool) -> None:
        own = dict(node_config)
        if "state-dir" in own:
            own["state-dir"] = str(Path(str(config.run_dir)) / "silos")
        run_inprocess(config, answer, own, resume=resume, live=False)

    return carry_out


def with_border(config: RunConfig, silo: str | None) -> RunConfig:
    """Return a run's configuration with the privacy that its tree sets for a silo of its own.

    Raises
    ------
    PhotonError
        If what it sets cannot be.
    """
    root = config.federation.root
    node = root.child(silo) if root is not None and silo is not None else None
    if node is None or not node.is_silo or node.privacy is None:
        return config
    try:
        return config.model_copy(update={"privacy": config.border_privacy(node)})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise PhotonError(f"federation.tree: {node.name}: {key}: {problem['msg']}") from error
