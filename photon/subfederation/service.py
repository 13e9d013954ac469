"""A federation in the place of a silo, as a node; see `photon.silo.service`.

What branches, gateways and islands share is here; what each costs and how its rounds are run is theirs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from photon.config.schema import RunConfig
from photon.config.tree import TreeNode
from photon.errors import PhotonError, RunError
from photon.link.messages import Body, EvaluateReport, EvaluateRequest, SiloInfo, TrainReport, TrainRequest
from photon.silo.policy import Cost
from photon.silo.service import KeyQuestion, answer_keys
from photon.silo.site import SiloSite
from photon.strategy.contract import PARAMS, Contract
from photon.subfederation.member import Member

Groups = Mapping[str, Mapping[str, torch.Tensor]]


class FederationNode(ABC):
    """A federation that answers as a silo does.

    Parameters
    ----------
    name
        What the federation above calls it.
    site
        Where its things lie.
    config
        The configuration of the federation above, as it is carried out here.

    Attributes
    ----------
    rules
        What its operator has it decide for itself, which no configuration of a run has been checked with.
    is_federation
        Whether it is a federation in the place of a silo.
    """

    rules: TreeNode | None = None
    is_federation: ClassVar[bool] = True

    def __init__(self, name: str, site: SiloSite, config: RunConfig) -> None:
        self.name = name
        self.site = site
        self.config = config

    @cached_property
    @abstractmethod
    def member(self) -> Member:
        """The federation at work; made once preflight has passed the configuration above."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens that the text below it knows."""

    @abstractmethod
    def cost(self, request: TrainRequest) -> dict[str, Cost]:
        """Return what a request does with the text of each silo below it, at most."""

    def _cost(
        self,
        request: TrainRequest,
        steps: int,
        windows: int,
        length: int,
        *,
        releases: int = 1,
        available: int | None = None,
        start: int | None = None,
    ) -> Cost:
        """Return the cost of all its rounds, which go on where its own disk says.

        Parameters
        ----------
        steps, windows
            Of a silo, in all rounds of the request.
        length
            Tokens of a window.
        start
            Window that it begins with; None: after those of earlier requests.
        """
        if start is None:
            # Earlier requests may have asked for more or less; of each a silo reads so many times as much.
            asked = max(1, request.steps * request.batch_size)
            start = self.member.spans.read(request) * windows // asked
        return Cost(
            steps,
            windows,
            windows * length,
            releases=releases,
            start=start,
            available=available,
        )

    @property
    def inside(self) -> RunConfig:
        """Configuration of its own rounds."""
        return self.member.config

    def check_asked(self, silo: str, members: list[str]) -> None:
        """Check that a request means this federation.

        Raises
        ------
        PhotonError
            If it does not.
        """
        if silo != self.name or members != [silo]:
            raise PhotonError(
                f"this node is {self.name}, and the request is for {', '.join({silo, *members})}"
            )

    def check_contract(self, contract: Contract) -> None:
        """Check that what is to leave is what a federation has.

        Raises
        ------
        PhotonError
            If a state of the local optimizer is among it.
        """
        if others := [group for group in contract.due if group != PARAMS]:
            raise PhotonError(
                f"{self.name} is a federation, which has no {', '.join(others)} of its own; use a strategy "
                "that averages parameters alone"
            )

    def describe(self) -> list[SiloInfo]:
        """Ask the members, and describe them as one; of validation text only what the policy lets out."""
        described = self.member.describe()
        if not self.site.policy.share_validation:
            described = described.model_copy(update={"validation_tokens": None, "unigram_loss": None})
        return [described]

    def query(self, question: KeyQuestion) -> Body:
        """Take part in agreeing on the masks of a secure sum."""
        return answer_keys(question, self.site)

    def has_answered(self, request: TrainRequest) -> bool:
        """Tell whether the rounds of a request are trained already."""
        return self.member.spans.has_trained(request)

    def train(self, request: TrainRequest, groups: Groups, contract: Contract) -> tuple[Any, TrainReport]:
        """Train rounds of its own, and return what leaves, encoded as it travels, and the report."""
        with self._stopped():
            return self.member.train(request, groups, contract)

    def kept_file(self, request: TrainRequest) -> Path | None:
        """Return None: the store never has the file of a reply itself."""
        return None

    def evaluate(self, request: EvaluateRequest, groups: Groups) -> EvaluateReport:
        """Let the members evaluate the received model."""
        with self._stopped():
            return self.member.evaluate(request, groups[PARAMS])

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        """Say what stopped its rounds; those that are finished stay."""
        try:
            yield
        except RunError as error:
            raise PhotonError(f"{self.name}: {error}") from error
