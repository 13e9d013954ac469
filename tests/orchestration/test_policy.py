"""The policy sees drafts and nothing else; its logits are what they are said to be; files are checked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from photon.errors import PhotonError
from photon.orchestration.graph import allowed, contributions, likeliest, ranks
from photon.orchestration.method import Method, PolicySection
from photon.orchestration.policy import Policy, load_policy, save_policy
from tests.orchestration.test_graph import embeddings

KINDS: list[dict[str, Any]] = [
    {},
    {"logits": "asymmetric"},
    {"learn_scale": True},
    {"logit_scale": "1", "logit_bias": None},
]


def policy_of(size: int = 6, seed: int = 0, **settings: Any) -> Policy:
    made = Policy(PolicySection(dropout=0.0, feedforward=2, **settings), size, seed=seed).double()
    return made.eval()


def logits_of(policy: Policy, r: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = policy(r[None])[0]
        return found


@pytest.mark.parametrize("settings", KINDS)
def test_permuting_agents_permutes_the_graph(settings: dict[str, Any]) -> None:
    policy = policy_of(
        logit_bias=settings.get("logit_bias", 0.0), **{k: v for k, v in settings.items() if k != "logit_bias"}
    )
    r = embeddings(7, 3)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(5))
    logits, permuted = logits_of(policy, r), logits_of(policy, r[order])
    assert torch.allclose(permuted, logits[order][:, order], atol=1e-12)
    graphs = [
        likeliest(logits - logits.median(), ranks(contributions(one)))
        for logits, one in ((logits, r), (permuted, r[order]))
    ]
    assert torch.equal(graphs[1], graphs[0][order][:, order])
    assert graphs[0].any()


@pytest.mark.parametrize("settings", KINDS)
def test_any_number_of_agents(settings: dict[str, Any]) -> None:
    policy = policy_of(**settings)
    for agents in (1, 5, 10, 15, 20):
        assert logits_of(policy, embeddings(agents, 0)).shape == (agents, agents)


def test_gram_logits_are_symmetric_and_positive_semidefinite() -> None:
    for seed in range(5):
        logits = logits_of(policy_of(seed=seed, logit_scale="1", logit_bias=None), embeddings(8, seed))
        assert torch.allclose(logits, logits.T, atol=1e-12)
        assert float(torch.linalg.eigvalsh(logits)[0]) > -1e-9
        assert bool((logits <= torch.maximum(logits.diag()[:, None], logits.diag()[None]) + 1e-9).all())


def test_equal_drafts_are_joined_unless_a_bias_is_against_it() -> None:
    size = 64
    same = embeddings(1, 0, size).expand(5, size)
    without = logits_of(policy_of(size, logit_scale="1", logit_bias=None), same)
    # A layer norm of unit gain gives h a squared length of d.
    assert torch.allclose(without, torch.tensor(float(size), dtype=torch.float64), rtol=1e-3)
    assert bool((without.sigmoid() >= 0.5).all())
    for scale, kappa in (("4/d", 4 / size), ("1/sqrt(d)", size**-0.5), (0.5, 0.5)):
        biased = policy_of(size, logit_scale=scale, logit_bias=-(kappa * size + 1))
        for r in (same, embeddings(9, 1, size)):
            logits = logits_of(biased, r)
            assert float(logits.max()) <= -1 + 1e-9
            assert not likeliest(logits, ranks(contributions(r))).any()


def test_gram_logits_cannot_favour_edges_between_unlike_drafts_and_asymmetric_ones_can() -> None:
    one, other = embeddings(2, 0)
    r = torch.stack([one, one, other, other])
    for seed in range(20):
        logits = logits_of(policy_of(seed=seed, logit_scale="1", logit_bias=None), r)
        assert float(logits[0, 2]) <= max(float(logits[0, 1]), float(logits[2, 3])) + 1e-9
    policy = policy_of(logits="asymmetric", logit_bias=0.0)
    with torch.no_grad():
        policy.query.weight.copy_(torch.eye(6))
        policy.key.weight.copy_(-torch.eye(6))
    logits = logits_of(policy, r)
    assert float(logits[0, 2]) > max(float(logits[0, 1]), float(logits[2, 3]))
    hidden = policy.layer(r[None])[0]
    assert torch.allclose(logits, -(4 / 6) * hidden @ hidden.T)


def test_first_weights_are_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = policy_of(seed=4).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    again, other = policy_of(seed=4).state_dict(), policy_of(seed=5).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", KINDS)
def test_a_file_brings_back_the_policy(tmp_path: Path, settings: dict[str, Any]) -> None:
    method = Method(policy=PolicySection(feedforward=2, **settings))
    policy = Policy(method.policy, 8, seed=3)
    save_policy(tmp_path / "p.safetensors", policy, method)
    loaded = load_policy(tmp_path / "p.safetensors")
    assert loaded.method == method
    assert not loaded.policy.training
    r = embeddings(4, 0, 8).float()
    assert torch.equal(logits_of(loaded.policy, r), logits_of(policy.eval(), r))


def test_files_that_are_no_policies_are_refused(tmp_path: Path) -> None:
    method = Method(policy=PolicySection(feedforward=1))
    file = tmp_path / "p.safetensors"
    save_policy(file, Policy(method.policy, 8), method)
    tensors = load_file(file)
    header = json.dumps({"size": 8, "method": method.model_dump(mode="json")})

    def written(change: dict[str, Tensor], text: str = header) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({**tensors, **change}, path, metadata={"photon_policy": text})
        return path

    bad = torch.full_like(tensors["bias"], float("nan"))
    weight = "layer.linear1.weight"
    for path, why in (
        (tmp_path / "none", "cannot read the policy"),
        (written({"more": torch.zeros(2)}), "more is not as the policy's settings say"),
        (written({weight: torch.zeros(2)}), f"{weight} is not as"),
        (written({"bias": bad}), "bias has values that are not finite"),
        (written({}, header.replace('"size": 8', '"size": 4097', 1)), "settings cannot be read"),
        (written({}, header.replace('"size": 8', '"size": 10', 1)), "is not as the policy's settings say"),
        (written({}, "{"), "settings cannot be read"),
        (written({}, header.replace("dropout", "droput")), "did you mean 'policy.dropout'"),
    ):
        with pytest.raises(PhotonError, match=why) as raised:
            load_policy(path)
        assert "\n" not in str(raised.value)
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(PhotonError, match="not of a policy"):
        load_policy(tmp_path / "weights.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(PhotonError, match="cannot read the policy"):
        load_policy(tmp_path / "text")


def test_one_agent_has_no_edges() -> None:
    assert not allowed(ranks(torch.tensor([1.0]))).any()
