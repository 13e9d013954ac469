"""A silo as a node: what it costs it to do what is asked, and doing it.

It is called by the gate alone (`photon.node`), which has judged the request by then.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from photon.config.schema import RunConfig
from photon.config.tree import TreeNode
from photon.errors import PhotonError, RefusedError
from photon.link.encoding import PackedGroups
from photon.link.messages import (
    AdvertiseKeys,
    Body,
    CheckShares,
    EvaluateReport,
    EvaluateRequest,
    ShareKeys,
    SiloInfo,
    TrainReport,
    TrainRequest,
    Unmask,
)
from photon.objective.configured import objective_of
from photon.silo import secure
from photon.silo.describe import describe
from photon.silo.evaluate import evaluate
from photon.silo.kept import reply_file, silo_store
from photon.silo.policy import Cost
from photon.silo.site import NodeSettings, SiloSite
from photon.silo.statistics import sum_up
from photon.silo.train import train
from photon.strategy.contract import Contract

Groups = Mapping[str, Mapping[str, torch.Tensor]]
#: What the participants of a secure sum are asked.
KeyQuestion = AdvertiseKeys | ShareKeys | CheckShares | Unmask


class SiloNode:
    """The silos whose text lies in ``data-dir``, each a participant of its own.

    Parameters
    ----------
    settings
        What the operator has set.
    site
        Where things lie.
    config
        The run's configuration, as it is carried out here.

    Attributes
    ----------
    inside, rules
        Configuration and rules of rounds of its own: it has none.
    is_federation
        Whether it is a federation in the place of a silo.
    """

    inside: RunConfig | None = None
    rules: TreeNode | None = None
    is_federation: ClassVar[bool] = False

    def __init__(self, settings: NodeSettings, site: SiloSite, config: RunConfig) -> None:
        self.settings = settings
        self.site = site
        self.config = config

    @property
    def vocab_size(self) -> int:
        """Tokens that the text knows."""
        return self.site.vocab_size

    def check_asked(self, silo: str, members: list[str]) -> None:
        """Check that a participant is one of the silos here, and is asked to train on its own text.

        Raises
        ------
        RefusedError
            If the operator does not allow what it is.
        """
        here = self.site.prepared().silo_names
        if silo in here and members == [silo]:
            return
        root = self.config.federation.root
        child = None if root is None else root.child(silo)
        if child is not None and not child.is_silo:
            raise RefusedError(
                f"refused by the node of {', '.join(here)}: the request is for {silo}, a federation of the "
                "run's tree; the operator allows that with branches=true in the node config"
            )
        if not self.settings.may_pool:
            raise RefusedError(
                f"refused by the node of {', '.join(here)}: the request is for {silo}, on the text of "
                f"{', '.join(members)}; the operator allows other participants than the silos themselves "
                "with pooling=true in the node config"
            )
        if unknown := sorted(set(members) - set(here)):
            raise PhotonError(f"{self.site.data} has no silo {unknown[0]!r}: it has {', '.join(here)}")
        self.site.policy.check_stand_in(silo, f"the text of {', '.join(members)} in one")

    def check_contract(self, contract: Contract) -> None:
        """Check that what is to leave is what a silo has: all that a strategy may ask for."""

    def describe(self) -> list[SiloInfo]:
        """Describe the silos."""
        return describe(self.site, self.config)

    def query(self, question: KeyQuestion) -> Body:
        """Take part in agreeing on the masks of a secure sum."""
        return answer_keys(question, self.site)

    def has_answered(self, request: TrainRequest) -> bool:
        """Tell whether the reply to a request is kept, so that nothing is trained for it."""
        store = silo_store(request.silo, self.site, self.config)
        return store.reply(request.run_id, request.model_id, request.round) is not None

    def cost(self, request: TrainRequest) -> dict[str, Cost]:
        """Return what a request does with each silo's text, at most: of pooled text all may be of one.

        One of no steps reads all of it once.
        """
        manifest = self.site.prepared().manifest
        texts = {member: manifest.silos[member].train for member in request.members}
        if request.steps == 0:
            return {
                silo: Cost(0, text.sequences, text.tokens, releases=1, available=text.sequences)
                for silo, text in texts.items()
            }
        windows = request.steps * request.batch_size
        cost = Cost(
            request.steps,
            windows,
            windows * manifest.sequence_length,
            releases=1,
            start=request.position,
            available=sum(text.sequences for text in texts.values()),
        )
        return dict.fromkeys(request.members, cost)

    def train(
        self, request: TrainRequest, groups: Groups, contract: Contract
    ) -> tuple[PackedGroups, TrainReport]:
        """Train, and return what leaves, encoded as it travels, and the report."""
        work = train if objective_of(self.config).trains else sum_up
        return work(request, groups, contract, self.site, self.config)

    def kept_file(self, request: TrainRequest) -> Path | None:
        """Return the file of a reply that the store may have itself."""
        # Server and silos are one user on one machine there.
        shared = self.site.simulated and self.config.federation.engine == "simulation"
        return reply_file(request, self.site, self.config) if shared else None

    def evaluate(self, request: EvaluateRequest, groups: Groups) -> EvaluateReport:
        """Evaluate the received model on a silo's validation text."""
        return evaluate(request, groups, self.site, self.config)


def answer_keys(question: KeyQuestion, site: SiloSite) -> Body:
    """Do a participant's part in agreeing on masks; it is the same for silos and federations."""
    if isinstance(question, AdvertiseKeys):
        return secure.advertise_keys(question, site)
    if isinstance(question, ShareKeys):
        return secure.share_keys(question, site)
    if isinstance(question, CheckShares):
        return secure.check_shares(question, site)
    return secure.unmask(question, site)
