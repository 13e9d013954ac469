"""FedAnchor under ordinary rounds: what a silo trains, what never moves there, and SemiFL as one case."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from photon.data.prepared import PreparedData
from photon.errors import PhotonError, RunError
from photon.models.build import build_model
from photon.models.heads import add_heads
from photon.objective.anchor import ANCHORS, AnchorLabels
from photon.objective.configured import model_of
from photon.state.checkpoint import CheckpointStore
from photon.state.tensors import load_groups
from photon.strategy.anchored import Given
from photon.strategy.local import Finish
from photon.training.draws import draw_seed, seeded
from photon.training.groups import read_params
from tests.conftest import SMALL, composed
from tests.labelled_texts import NAMES, labelled_corpus

Run = Callable[..., dict[str, Any]]
ANCHORED = [
    "objective=anchor",
    f"objective.classes=[{','.join(NAMES)}]",
    "objective.proj_dim=8",
    "objective.max_anchors=24",
    "strategy=anchor",
    "federation.server_silo=anchors",
    "cohort=null",
    "evaluation.cohort=null",
]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def values(folder: Path) -> dict[str, float]:
    return {name: one for event in events(folder, "diagnostics") for name, one in event["values"].items()}


def test_silos_learn_classes_of_which_they_have_no_label(
    run_small: Run, labelled: Path, tmp_path: Path
) -> None:
    summary = run_small(
        *ANCHORED,
        "rounds=3",
        "local_steps=12",
        "objective.threshold=0.5",
        "optimizer.lr=1e-2",
        "telemetry.report=true",
        data=labelled,
    )
    told = [event["figures"]["accuracy"] for event in events(tmp_path / "run", "evaluated")]
    assert told[0] < 0.7, told
    assert told[-1] > 0.9, told
    found = values(tmp_path / "run")
    assert found["pseudo_label_accuracy/a"] > 0.9
    assert 0 < found["coverage/c"] <= 1
    assert "pseudo_label_accuracy/c" not in found, "nobody knows its labels"
    assert summary["labels"]["accuracy"] == pytest.approx(told[-1])
    assert summary["labels"]["rounds"][-1]["pseudo_label_accuracy"] > 0.9
    report = (tmp_path / "run" / "report.html").read_text()
    assert "labels trained on" in report
    notices = [event["message"] for event in events(tmp_path / "run", "notice")]
    assert any("c has no validation text with a label" in one for one in notices)
    checkpoint, _ = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    anchors = checkpoint.load_kept()[ANCHORS]
    there = anchors["labels"] >= 0
    assert 9 <= int(there.sum()) <= 24
    torch.testing.assert_close(anchors["vectors"][there].norm(dim=1), torch.ones(int(there.sum())))


def test_no_step_of_a_silo_moves_the_anchor_head(
    run_small: Run, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[bool, bool, bool]] = {}
    plain = Given.finish

    def finish(self: Given, start: Any, trained: Any, request: Any) -> Finish:
        heads = [name for name in start.params if name.startswith("anchor_head.")]
        assert heads
        before = start.reference
        leaves = plain(self, start, trained, request)
        seen[request.silo] = (
            all(torch.equal(trained.params[name], before[name]) for name in heads),
            not set(heads) & set(leaves.leaves["params"]),
            torch.equal(trained.params["class_head.weight"], before["class_head.weight"]),
        )
        assert (ANCHORS in leaves.leaves) == (request.silo == "anchors")
        return leaves

    monkeypatch.setattr(Given, "finish", finish)
    run_small(*ANCHORED, "rounds=1", "objective.threshold=0", "optimizer.weight_decay=0.5", data=labelled)
    assert seen.pop("anchors") == (False, False, False)
    assert seen == dict.fromkeys("abc", (True, True, False))


@pytest.mark.few(1)
@pytest.mark.parametrize("order", ["before", "after"])
def test_silos_that_are_sure_of_nothing_leave_the_model_alone(
    run_small: Run, labelled: Path, tmp_path: Path, order: str
) -> None:
    nothing = (*ANCHORED, "objective.threshold=1.01", f"objective.server_order={order}", "outer=diloco")
    summary = run_small(*nothing, "rounds=2", data=labelled)
    ends = {
        (e["round"], e["silo"]): (e["steps"], e["tokens"]) for e in events(tmp_path / "run", "silo_finished")
    }
    assert all(done == ((4, 256) if silo == "anchors" else (0, 0)) for (_, silo), done in ends.items())
    assert len(ends) == 8
    notices = [event["message"] for event in events(tmp_path / "run", "notice")]
    assert sum("found nothing to train on, and took no steps" in one for one in notices) == 6
    checkpoint, _ = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    if order == "before":
        trained = load_groups(tmp_path / "run" / "own.safetensors")["params"]
        assert all(torch.equal(trained[name], one) for name, one in checkpoint.load_params().items())
    assert not checkpoint.load_outer(), "no outer step was taken"
    assert checkpoint.state.round == 2
    assert summary["rounds"] == 2
    # The anchors alone: the same whoever else is there.
    alone = run_small(*nothing, "rounds=2", "cohort=1", data=labelled, name="alone")
    assert alone["weights_sha256"] == summary["weights_sha256"]


@pytest.mark.parametrize("order", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_a_run_repeats_and_goes_on_where_it_was(
    run_small: Run, labelled: Path, tmp_path: Path, order: str
) -> None:
    overrides = (
        *ANCHORED,
        "objective.coverage=0.5",
        "objective.threshold=null",
        f"objective.server_order={order}",
    )
    whole = run_small(*overrides, data=labelled)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "round-000003")
    (tmp_path / "run" / "summary.json").unlink()
    again = run_small(*overrides, data=labelled, resume=True)
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert run_small(*overrides, data=labelled, name="anew")["weights_sha256"] == whole["weights_sha256"]
    other = run_small(*overrides, "seed=1", data=labelled, name="other")
    assert other["weights_sha256"] != whole["weights_sha256"]


def test_means_of_classes_label_as_all_anchors_do(run_small: Run, labelled: Path, tmp_path: Path) -> None:
    told = {}
    for send in ("all", "means"):
        run_small(*ANCHORED, f"objective.send={send}", "rounds=1", data=labelled, name=send)
        told[send] = {
            name: one for name, one in values(tmp_path / send).items() if name.startswith("confidence/")
        }
        kept = CheckpointStore(tmp_path / send / "checkpoints").latest()[0].load_kept()[ANCHORS]
        assert len(kept["labels"]) == (24 if send == "all" else 3)
    assert set(told["all"]) == {f"confidence/{silo}" for silo in "abc"}
    assert told["means"] == pytest.approx(told["all"], rel=1e-5)


# --- SemiFL, written out ------------------------------------------------------------------------------


def hidden_mean(model: Any, tokens: Tensor | None, weights: Tensor, vectors: Tensor | None = None) -> Tensor:
    """Return the mean hidden state over the weights, as the formula reads."""
    given = {"inputs_embeds": vectors} if tokens is None else {"input_ids": tokens}
    states = model.transformer(**given, attention_mask=(weights > 0).long()).last_hidden_state
    return (states * weights.float()[..., None]).sum(1) / weights.float().sum(1, keepdim=True)


def order_of(count: int, seed: int, taken: int) -> np.ndarray:
    epochs = [np.random.default_rng([seed, epoch]).permutation(count) for epoch in range(-(-taken // count))]
    return np.concatenate(epochs)[:taken]


class SemiFL:
    """Clients first, labels by the classifier's confidence, then fine-tuning on the server: plain PyTorch."""

    def __init__(self, data: PreparedData, *, steps: int, batch: int, rate: float, threshold: float) -> None:
        self.data, self.steps, self.batch, self.rate, self.threshold = data, steps, batch, rate, threshold

    def texts(self, silo: str) -> tuple[Tensor, Tensor, Tensor]:
        arrays = self.data.arrays(silo, "train")
        tokens = torch.from_numpy(arrays["tokens"].astype("int64"))
        lengths = torch.from_numpy(arrays["lengths"].astype("int64"))
        numbers = [NAMES.index(name) for name in self.data.manifest.classes]
        labels = torch.tensor([numbers[one] if one >= 0 else -1 for one in arrays["labels"][:, 0]])
        return tokens, torch.arange(tokens.shape[1]) < lengths, labels

    def client(self, model: Any, silo: str, number: int) -> int:
        tokens, mask, _ = self.texts(silo)
        with torch.no_grad():
            parts = zip(tokens.split(64), mask.split(64), strict=True)
            logits = torch.cat([model.class_head(hidden_mean(model, *part)) for part in parts])
        sure, guess = logits.softmax(1).max(1)
        fix = torch.nonzero(sure >= self.threshold)[:, 0]
        if not len(fix):
            return 0
        draws = torch.Generator().manual_seed(random.Random(f"0/{number}/{silo}/prepare").getrandbits(63))
        mix = torch.randint(len(tokens), (len(fix),), generator=draws)
        optimizer = torch.optim.SGD(model.parameters(), lr=self.rate, momentum=0.9, nesterov=True, fused=True)
        cross = nn.functional.cross_entropy
        order = order_of(len(fix), stream(silo) + number, self.steps * self.batch)
        with seeded(draw_seed(0, number, silo, "train"), torch.device("cpu")):
            for rows in np.split(order, self.steps):
                one, other = fix[rows], mix[rows]
                own = cross(model.class_head(hidden_mean(model, tokens[one], mask[one])), guess[one])
                share = float(torch.distributions.Beta(0.75, 0.75).sample())
                first, second = share * mask[one], (1 - share) * mask[other]
                embed = model.transformer.wte
                vectors = first[..., None] * embed(tokens[one]) + second[..., None] * embed(tokens[other])
                made = model.class_head(hidden_mean(model, None, first + second, vectors))
                mixed = share * cross(made, guess[one]) + (1 - share) * cross(made, guess[other])
                optimizer.zero_grad()
                (own + mixed).backward()
                optimizer.step()
        return len(fix)

    def server(self, model: Any, number: int) -> None:
        tokens, mask, labels = self.texts("anchors")
        optimizer = torch.optim.SGD(model.parameters(), lr=self.rate, momentum=0.9, nesterov=True, fused=True)
        order = order_of(len(tokens), stream("anchors") + number, self.steps * self.batch)
        for rows in np.split(order, self.steps):
            logits = model.class_head(hidden_mean(model, tokens[rows], mask[rows]))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()

    def run(self, model: Any, rounds: int) -> tuple[dict[str, Tensor], list[int]]:
        state, chosen = {name: one.clone() for name, one in read_params(model).items()}, []
        load = lambda params: model.load_state_dict(params, strict=False)  # noqa: E731
        for number in range(1, rounds + 1):
            replies = []
            for silo in ("a", "b", "c"):
                load(state)
                chosen.append(self.client(model, silo, number))
                if chosen[-1]:
                    replies.append({name: one.clone() for name, one in read_params(model).items()})
            if replies:
                state = replies[0]
                for count, reply in enumerate(replies[1:], 2):
                    state = {name: torch.lerp(one, reply[name], 1 / count) for name, one in state.items()}
            load(state)
            self.server(model, number)
            state = {name: one.clone() for name, one in read_params(model).items()}
        return state, chosen


def stream(silo: str) -> int:
    import zlib

    return zlib.crc32(silo.encode())  # seed 0


def test_semifl_is_a_special_case_bit_for_bit(run_small: Run, labelled: Path, tmp_path: Path) -> None:
    own = (
        "objective.labels=classifier",
        "objective.lambda_lc=0",
        "objective.server_order=after",
        "objective.threshold=0.45",
        "objective.token_dropout=0",
        "objective.span=0",
        "strategy.local_state=reset",
        "optimizer=sgd",
        "optimizer.lr=0.05",
        "optimizer.momentum=0.9",
        "+optimizer.nesterov=true",
        "schedule=constant",
        "model.recipe.warmup_steps=0",
        "training.clip_norm=null",
        "rounds=3",
    )
    run_small(*ANCHORED, *own, data=labelled)
    config = composed(*SMALL, *ANCHORED, *own, "data.path=none")
    data = PreparedData.open(labelled)
    torch.set_num_threads(1)
    model = model_of(config, data.manifest.vocab_size)
    reference = SemiFL(data, steps=4, batch=4, rate=0.05, threshold=0.45)
    expected, chosen = reference.run(model, 3)
    assert sum(chosen) > 0
    assert any(0 < count < 30 for count in chosen), chosen
    after = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_params()
    for name, tensor in after.items():
        assert torch.equal(tensor, expected[name]), name
    assert ANCHORS not in CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_kept()


# --- what cannot be -----------------------------------------------------------------------------------


def test_a_class_with_one_anchor_is_no_trouble_and_one_without_is_told(
    run_small: Run, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    data = labelled_corpus(
        tmp_path / "one", {"anchors": {"low": 12, "middle": 12, "high": 4}, "a": {"low": 30, "high": 30}}
    )
    labels = PreparedData.open(data).arrays("anchors", "train")["labels"][:, 0]
    assert (labels == PreparedData.open(data).manifest.classes.index("high")).sum() == 1
    summary = run_small(*ANCHORED, "rounds=2", "objective.threshold=0", data=data)
    assert math.isfinite(summary["labels"]["accuracy"])
    with pytest.raises(
        (PhotonError, RunError), match=r"anchors: has no anchor of the class 'else'.*remove the class"
    ):
        run_small(*ANCHORED, "objective.classes=[low,middle,high,else]", data=data, name="else")
    with pytest.raises((PhotonError, RunError), match=r"its label 'high' is none of objective\.classes"):
        run_small(*ANCHORED, "objective.classes=[low,middle]", data=data, name="fewer")
    with pytest.raises((PhotonError, RunError), match=r"anchors, and objective\.max_anchors=3; raise that"):
        run_small(*ANCHORED, "objective.max_anchors=3", data=data, name="many")


def test_labels_that_the_run_does_not_know_are_not_measured(
    run_small: Run, tmp_path: Path, labelled: Path
) -> None:
    (tmp_path / "two").mkdir()
    data = labelled_corpus(
        tmp_path / "two", {"anchors": {"low": 10, "middle": 10}, "a": {"low": 30, "high": 30}}
    )
    run_small(*ANCHORED, "objective.classes=[low,middle]", "objective.threshold=0", "rounds=1", data=data)
    assert values(tmp_path / "run")["pseudo_label_accuracy/a"] >= 0
    counts = {
        name: one["tokens"] for name, one in events(tmp_path / "run", "evaluated")[-1]["per_silo"].items()
    }
    truth = PreparedData.open(data).arrays("a", "validation")["labels"][:, 0]
    assert counts["a"] == min(8, int((truth == PreparedData.open(data).manifest.classes.index("low")).sum()))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["objective.classes=[low]"], "classes: name two or more"),
        (["objective.coverage=0.5"], "threshold and coverage: set one of them"),
        (["objective.threshold=null"], "threshold and coverage: set one of them"),
        (["objective.tau=0"], "tau=0: must be above 0"),
        (["objective.send=means", "objective.score=knn"], "send=means: score=knn looks at each anchor"),
        (["objective.scores=max"], "objective.scores: unknown key; did you mean 'objective.score'"),
        (["federation.server_silo=null"], "federation.server_silo: not set"),
        (["strategy=photon"], "strategy: Photon has no part for the aggregator's silo.*strategy=anchor"),
        (["objective=causal_lm", "~objective.classes"], "CausalLM needs nothing of an aggregator's silo"),
        (["privacy.clip_norm=1"], "privacy: what the aggregator's silo gives"),
        (["link.states=[{_target_: photon.link.codecs.Cast, dtype: bfloat16}]"], "link.states: labels of"),
    ],
)
def test_settings_that_cannot_be(overrides: list[str], told: str) -> None:
    base = [one for one in ANCHORED if "~objective.classes" not in overrides or "objective." not in one]
    kept = [one for one in overrides if not one.startswith("~")]
    with pytest.raises(PhotonError, match=told):
        composed(*SMALL, "data.path=none", *base, *kept)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda one: one["vectors"].fill_(math.nan), "not finite"),
        (lambda one: one["vectors"].fill_(3.0), "longer than 1"),
        (lambda one: one["labels"].fill_(7.0), "none of the 3 labels"),
        (lambda one: one["labels"].fill_(0.5), "none of the 3 labels"),
        (lambda one: one["labels"].fill_(-1.0), "no anchor came"),
    ],
)
def test_anchors_that_came_are_not_believed(change: Callable[[Any], Any], told: str) -> None:
    tensors = {"vectors": nn.functional.normalize(torch.randn(6, 4), dim=1), "labels": torch.arange(6.0) % 3}
    objective = AnchorLabels(classes=NAMES)
    assert objective.read_anchors(tensors).labels.tolist() == [0, 1, 2, 0, 1, 2]
    change(tensors)
    with pytest.raises(PhotonError, match=told):
        objective.read_anchors(tensors)


def test_what_fills_a_row_is_not_seen() -> None:
    config = composed(*SMALL, *ANCHORED, "data.path=none")
    model = model_of(config, 300).eval()
    objective = AnchorLabels(classes=NAMES, token_dropout=0, span=0, alpha=0)
    torch.manual_seed(0)
    tokens, lengths = torch.randint(300, (4, 16)), torch.tensor([[16], [3], [9], [1]])
    batch = {"tokens": tokens, "lengths": lengths, "labels": torch.tensor([[0], [1], [2], [0]])}
    filled = torch.where(torch.arange(16) < lengths, tokens, 299)
    with torch.no_grad():
        loss = objective.loss(model, batch, None).value
        assert objective.loss(model, {**batch, "tokens": filled}, None).value == loss
        # With λ = 1 the mixture is the text.
        pseudo = {"pseudo": batch["labels"], "mix_pseudo": batch["labels"].flip(0)}
        mixed = {**batch, **pseudo, "mix_tokens": tokens.flip(0), "mix_lengths": lengths.flip(0)}
        found = objective.loss(model, mixed, None)
    torch.testing.assert_close(found.figures["mix_loss"], found.value - found.figures["mix_loss"])


def test_heads_are_no_part_of_what_is_exported() -> None:
    config = composed(*SMALL, "data.path=none")
    plain = build_model(config.model, 300, seed=0)
    with_heads = add_heads(build_model(config.model, 300, seed=0), classes=3, dimension=4, layers=2)
    left = AnchorLabels(classes=NAMES).plain(read_params(with_heads))
    assert set(left) == set(read_params(plain)) < set(read_params(with_heads))
