"""One question: drafts, a graph, one propagation along it, and the response that is the answer."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from photon.endpoints.agent import Agent, Message
from photon.endpoints.client import Client
from photon.endpoints.reply import Reply
from photon.orchestration.encoder import Encode
from photon.orchestration.graph import chosen, in_order
from photon.orchestration.method import Method
from photon.orchestration.questions import Question
from photon.orchestration.who import Responses, Who


@dataclass
class Spent:
    """What a question has cost, whether it was asked for now or answered before.

    Attributes
    ----------
    calls
        Answers of agents.
    prompt_tokens, completion_tokens
        As reported.
    unreported
        Answers that came without both.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0

    def count(self, reply: Reply) -> None:
        """Count an answer."""
        self.calls += 1
        self.prompt_tokens += reply.prompt_tokens or 0
        self.completion_tokens += reply.completion_tokens or 0
        self.unreported += reply.prompt_tokens is None or reply.completion_tokens is None


@dataclass(frozen=True)
class Propagation:
    """A graph and what came of it.

    Attributes
    ----------
    order
        Agents in the order π.
    psi
        Their contributions, by agent.
    edges
        Pairs of agents: the second has read the first.
    refined
        Agents that answered again.
    """

    order: tuple[int, ...]
    psi: tuple[float, ...]
    edges: tuple[tuple[int, int], ...]
    refined: tuple[int, ...]


@dataclass
class Answered:
    """A question with its answer.

    Attributes
    ----------
    drafts, responses
        Texts of the agents, before and after propagation.
    parallel
        The agent whose draft the drafts alone choose.
    chosen
        The agent whose response is the answer.
    propagations
        One, or with SelfOrg several; where the first has no edges it is the only one.
    """

    question: Question
    drafts: list[str]
    responses: list[str]
    parallel: int
    chosen: int
    propagations: list[Propagation]
    spent: Spent = field(default_factory=Spent)


class Orchestra:
    """Agents and what is done with what they answer.

    Parameters
    ----------
    client
        Asks them.
    agents
        Who they are, in an order that decides ties.
    encode
        Makes vectors of responses.
    method
        Settings.
    """

    def __init__(self, client: Client, agents: Sequence[Agent], encode: Encode, method: Method) -> None:
        self.client, self.agents, self.method = client, list(agents), method
        self._encode = encode

    def drafts(self, question: Question, spent: Spent, *, is_vote: bool = False) -> list[str]:
        """Return the drafts of all agents, asked at once; or as many of the first agent alone.

        Raises
        ------
        EndpointError
            If an agent does not answer.
        """
        asked: list[Message] = [{"role": "user", "content": question.prompt()}]
        waiting: list[Future[Reply]] = [
            self.client.submit(self.agents[0], asked, draw=number)
            if is_vote
            else self.client.submit(agent, asked)
            for number, agent in enumerate(self.agents)
        ]
        return [_text(one.result(), spent) for one in waiting]

    def embedded(self, question: Question, texts: Sequence[str]) -> Responses:
        """Return responses with their vectors, contributions and order."""
        found = [question.found(text) for text in texts]
        answers = [text.strip() if one is None else one for one, text in zip(found, texts, strict=True)]
        if self.method.encoder.of == "text":
            shown = list(texts)
        else:
            shown = [
                text if one is None else question.meaning(one) for one, text in zip(found, texts, strict=True)
            ]
        return Responses.of(self._encode(shown), answers)

    def propagated(
        self, question: Question, texts: Sequence[str], order: Sequence[int], edges: Tensor, spent: Spent
    ) -> list[str]:
        """Let agents answer again in the order π, each who reads somebody; return the responses of all.

        Parameters
        ----------
        texts
            Responses so far, by agent.
        order
            Agents in the order π.
        edges
            bool of shape (N, N).
        spent
            Counts the answers.

        Raises
        ------
        EndpointError
            If an agent does not answer.
        """
        current = list(texts)
        for agent in order:
            read = [other for other in order if edges[other, agent]]
            if read:
                asked = self._refinement(question, current[agent], [current[other] for other in read])
                current[agent] = _text(self.client.chat(self.agents[agent], asked), spent)
        return current

    def _refinement(self, question: Question, own: str, others: Sequence[str]) -> list[Message]:
        most = self.method.most_characters
        listed = "\n\n".join(f"{number}. {text[:most]}" for number, text in enumerate(others, 1))
        prompt = self.method.refine_prompt.format(question=question.prompt(), own=own[:most], others=listed)
        return [{"role": "user", "content": prompt}]

    def answer(self, question: Question, who: Who) -> Answered:
        """Answer a question.

        Raises
        ------
        EndpointError
            If an agent does not answer.
        """
        spent = Spent()
        drafts = self.drafts(question, spent, is_vote=who.is_vote)
        first = self.embedded(question, drafts)
        choose = _plurality if who.is_vote else self._nearest
        parallel = choose(first, first.psi)
        responses, seen, done = list(drafts), first, list[Propagation]()
        for _ in range(who.rounds):
            edges = who.edges(seen, question.id)
            order = in_order(seen.rank)
            done.append(_propagation(seen, order, edges))
            if not edges.any():
                break
            responses = self.propagated(question, responses, order, edges, spent)
            seen = self.embedded(question, responses)
        psi = seen.psi if self.method.recompute_psi else first.psi
        return Answered(question, drafts, responses, parallel, choose(seen, psi), done, spent)

    def _nearest(self, responses: Responses, psi: Tensor) -> int:
        return int(chosen(responses.embeddings, psi, self.method.psi_clip))


def _plurality(responses: Responses, _: Tensor) -> int:
    """Return who first gave the answer that most gave; of equally many the one that came first."""
    counts = Counter(responses.answers)
    return responses.answers.index(max(counts, key=lambda answer: counts[answer]))


def _propagation(seen: Responses, order: Sequence[int], edges: Tensor) -> Propagation:
    pairs = [(int(source), int(target)) for source, target in edges.nonzero().tolist()]
    return Propagation(
        tuple(order),
        tuple(round(value, 6) for value in seen.psi.tolist()),
        tuple(pairs),
        tuple(agent for agent in order if any(target == agent for _, target in pairs)),
    )


def _text(reply: Reply, spent: Spent) -> str:
    spent.count(reply)
    return reply.content
