"""One question through drafts, graph, propagation and aggregation, with agents that a test writes."""

from pathlib import Path

import pytest
import torch

from photon.endpoints.faults import EndpointError
from photon.errors import PhotonError
from photon.orchestration.answer import Answered, Orchestra
from photon.orchestration.encoder import NGrams
from photon.orchestration.graph import allowed
from photon.orchestration.method import Method, PolicySection, SelfOrgSection
from photon.orchestration.policy import Policy, save_policy
from photon.orchestration.questions import Question
from photon.orchestration.who import Responses, Who, by_policy, who_of
from tests.orchestration.stub import Says, Stub, agents

QUESTION = Question(id="q", question="Which one?", choices=["red", "green", "blue"], answer="green")
#: What is asked again has this in it.
AGAIN = "Your answer so far"


def drafting(drafts: str, again: str = "A") -> Says:
    """Draft a letter each, and answer with another one when asked again."""

    def says(name: str, asked: str, draw: int) -> str:
        return f"Answer: {again}" if AGAIN in asked else f"Answer: {drafts[int(name[1:])]}"

    return says


def orchestra(says: Says, number: int, **settings: object) -> tuple[Orchestra, Stub]:
    stub = Stub(says)
    return Orchestra(stub.client, agents(number), NGrams(64), Method.model_validate(settings)), stub


def letters(answered: Answered) -> str:
    return "".join(answered.question.found(text) or "-" for text in answered.responses)


@pytest.mark.parametrize("name", ["parallel", "rule", "selforg"])
def test_without_edges_nobody_is_asked_again(name: str) -> None:
    """And the answer is that of the drafts alone; drafts agree, so the rule has no edges either."""
    drafts = "BBAC" if name == "parallel" else "BBBB"
    players, stub = orchestra(drafting(drafts), 4)
    who = who_of(name, Method(selforg=SelfOrgSection(threshold=1.0)))
    if name == "selforg":
        # Equal drafts have equal contributions, and none is above another.
        assert not who.edges(players.embedded(QUESTION, ["B"] * 4), "q").any()
    answered = players.answer(QUESTION, who)
    assert answered.spent.calls == len(stub.asked) == 4
    assert answered.chosen == answered.parallel == 0
    assert answered.responses == answered.drafts
    assert [one.edges for one in answered.propagations] == [()]
    assert (answered.spent.prompt_tokens, answered.spent.completion_tokens) == (40, 8)


def test_in_a_full_graph_everybody_but_the_first_reads_all_before_it_as_they_are_now() -> None:
    seen: dict[str, list[str]] = {}

    def says(name: str, asked: str, draw: int) -> str:
        if AGAIN not in asked:
            return f"draft of {name}. Answer: {'BBBA'[int(name[1:])]}"
        seen[name] = [line for line in asked.splitlines() if " of a" in line]
        return f"second of {name}. Answer: B"

    players, stub = orchestra(says, 4)
    answered = players.answer(QUESTION, who_of("full", Method()))
    (done,) = answered.propagations
    assert done.order == (0, 1, 2, 3)
    assert done.refined == (1, 2, 3)
    assert answered.spent.calls == len(stub.asked) == 2 * 4 - 1
    assert seen["a1"] == ["draft of a1. Answer: B", "1. draft of a0. Answer: B"]
    assert seen["a3"] == [
        "draft of a3. Answer: A",
        "1. draft of a0. Answer: B",
        "2. second of a1. Answer: B",
        "3. second of a2. Answer: B",
    ]
    assert letters(answered) == "BBBB"


def test_the_rule_joins_unlike_drafts_alone() -> None:
    players, _ = orchestra(drafting("BBAC", again="B"), 4)
    answered = players.answer(QUESTION, who_of("rule", Method()))
    (done,) = answered.propagations
    answers = "BBAC"
    assert done.edges
    assert all(answers[i] != answers[j] for i, j in done.edges)
    unlike = sum(answers[i] != answers[j] for i in range(4) for j in range(i))
    assert len(done.edges) == unlike == 5
    # The majority is first and reads nobody.
    assert done.refined == done.order[2:]
    assert letters(answered) == "BBBB"


def test_a_majority_can_be_turned_over() -> None:
    players, _ = orchestra(drafting("AABC", again="C"), 4)
    answered = players.answer(QUESTION, who_of("rule", Method()))
    assert QUESTION.found(answered.drafts[answered.parallel]) == "A"
    assert letters(answered) == "AACC"
    everybody = players.answer(QUESTION, who_of("full", Method()))
    assert letters(everybody) == "ACCC"
    assert QUESTION.found(everybody.responses[everybody.chosen]) == "C"


def test_selforg_joins_similar_ones_of_lower_contribution_and_may_go_round_twice() -> None:
    method = Method(selforg=SelfOrgSection(threshold=-1.0, rounds=2))
    stub = Stub(drafting("BBAC", again="A"))
    players = Orchestra(stub.client, agents(4), NGrams(64), method)
    answered = players.answer(QUESTION, who_of("selforg", method))
    assert len(answered.propagations) == 2
    for done in answered.propagations:
        for i, j in done.edges:
            assert done.psi[i] > done.psi[j]
    strict = Method(selforg=SelfOrgSection(threshold=0.99))
    seen = Responses.of(players.embedded(QUESTION, [f"Answer: {one}" for one in "BBAC"]).embeddings, "BBAC")
    # All that are that similar are equal, so none is above.
    assert not who_of("selforg", strict).edges(seen, "q").any()


def test_self_consistency_asks_one_agent_and_takes_the_plurality() -> None:
    def says(name: str, asked: str, draw: int) -> str:
        return f"Answer: {'CBACB'[draw]}"

    players, stub = orchestra(says, 5)
    answered = players.answer(QUESTION, who_of("self-consistency", Method()))
    assert {name for name, _ in stub.asked} == {"a0"}
    # Two each for B and C: the one that came first.
    assert answered.chosen == 0


def test_one_agent_answers_for_itself() -> None:
    for name in ("parallel", "full", "rule", "selforg", "self-consistency"):
        players, stub = orchestra(drafting("B"), 1)
        answered = players.answer(QUESTION, who_of(name, Method()))
        assert (letters(answered), answered.chosen, len(stub.asked)) == ("B", 0, 1)


def test_a_policy_that_was_trained_decides() -> None:
    method = Method(policy=PolicySection(dropout=0.0, feedforward=1, logit_bias=0.0), test_decision="sample")
    policy = Policy(method.policy, 64)
    with torch.no_grad():
        policy.bias.fill_(100.0)
    everything = by_policy(policy, method)
    players, _ = orchestra(drafting("BBAC"), 4)
    answered = players.answer(QUESTION, Who("nexa", everything, 1, method))
    assert answered.spent.calls == 7
    with torch.no_grad():
        policy.bias.fill_(-4.0)
    sometimes = by_policy(policy, method)
    responses = players.embedded(QUESTION, ["B", "B", "A", "C"])
    drawn = [sometimes(responses, f"q{one}") for one in range(200)]
    # By the question, and the same ones each time.
    assert torch.equal(drawn[7], sometimes(responses, "q7"))
    share = torch.stack(drawn).float().mean(0)[allowed(responses.rank)]
    with torch.no_grad():
        wanted = policy(responses.embeddings[None])[0].sigmoid()[allowed(responses.rank)]
    assert torch.allclose(share, wanted, atol=0.12)
    assert 0 < float(share.mean()) < 1


def test_a_policy_for_other_vectors_is_refused(tmp_path: Path) -> None:
    method = Method(policy=PolicySection(feedforward=1))
    file = tmp_path / "p.safetensors"
    save_policy(file, Policy(method.policy, 16), method)
    who = who_of(f"nexa:{file}", Method())
    who.check_size(16)
    with pytest.raises(PhotonError, match="takes vectors of 16 numbers"):
        who.check_size(384)
    with pytest.raises(PhotonError, match="did you mean 'self-consistency'"):
        who_of("self_consistency", Method())


def test_responses_without_an_answer_are_embedded_as_they_are() -> None:
    players, _ = orchestra(drafting("B"), 1)
    seen = players.embedded(QUESTION, ["I do not know", "I  DO not know", "Answer: B", "green"])
    assert seen.answers == ("I do not know", "I  DO not know", "B", "B")
    near = seen.embeddings @ seen.embeddings.T
    assert float(near[0, 1]) == pytest.approx(1.0)
    assert float(near[2, 3]) == pytest.approx(1.0)
    whole, _ = orchestra(drafting("B"), 1, encoder={"of": "text"})
    vectors = whole.embedded(QUESTION, ["Answer: B", "green"]).embeddings
    assert float(vectors[0] @ vectors[1]) < 0.5


def test_what_is_shown_to_others_is_cut() -> None:
    players, stub = orchestra(drafting("BBAC"), 4, most_characters=5)
    players.answer(QUESTION, who_of("full", Method()))
    asked = [text for _, text in stub.asked if AGAIN in text]
    assert asked
    assert all("Answer: B" not in text.replace(QUESTION.prompt(), "") for text in asked)


def test_an_agent_that_fails_leaves_the_question_without_an_answer() -> None:
    players, _ = orchestra(lambda name, asked, draw: None if name == "a1" else "Answer: B", 3)
    with pytest.raises(EndpointError, match="agent a1"):
        players.answer(QUESTION, who_of("parallel", Method()))
    players, _ = orchestra(
        lambda name, asked, draw: None if AGAIN in asked else f"Answer: {'ABC'[int(name[1:])]}", 3
    )
    with pytest.raises(EndpointError):
        players.answer(QUESTION, who_of("full", Method()))


def test_braces_in_questions_and_answers_are_no_places() -> None:
    odd = Question(id="o", question="What is {own} in f'{x}'?", choices=["{", "}"])
    players, stub = orchestra(
        lambda name, asked, draw: f"{{others}} {name}\nAnswer: {'AB'[int(name[1:])]}", 2
    )
    players.answer(odd, who_of("full", Method()))
    assert "What is {own} in f'{x}'?" in stub.asked[-1][1]
    assert "{others} a0" in stub.asked[-1][1]
