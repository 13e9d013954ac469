"""What a node of the tree with children tells of them."""

from collections.abc import Mapping

from photon.config.schema import RunConfig
from photon.config.tree import TreeNode, unknown_silo
from photon.errors import PhotonError
from photon.federation.roster import joined
from photon.link.messages import SiloInfo
from photon.silo.describe import describe
from photon.silo.site import SiloSite


def describe_children(node: TreeNode, site: SiloSite, config: RunConfig) -> list[SiloInfo]:
    """Describe the children of a node of the tree, whose silos all have their text in ``site.data``.

    Raises
    ------
    PhotonError
        If a silo of the tree has no data.
    """
    silos = {silo.name: silo for silo in describe(site, config)}
    if problem := unknown_silo(node, sorted(silos)):
        raise PhotonError(problem)
    infos = [silos[child.name] if child.is_silo else _together(child, silos) for child in node.children]
    own = config.federation.server_silo
    if own is not None and own not in silos:
        raise PhotonError(f"federation.server_silo={own}: no such silo; there are {', '.join(sorted(silos))}")
    return infos if own is None else [*infos, silos[own]]


def _together(node: TreeNode, silos: Mapping[str, SiloInfo]) -> SiloInfo:
    """Describe a federation of the tree; its own text, and each of its silos, count as one."""
    return joined(node.name, [silos[name] for name in node.silos()], (node.rounds or 1) * node.pace)
