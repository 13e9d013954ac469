"""Settings of the method, from YAML."""

from pathlib import Path

import pytest

from photon.errors import PhotonError
from photon.orchestration.method import PAPER, Method, PolicySection, method_of, read_method


def test_defaults_and_what_the_paper_gives() -> None:
    assert read_method(None) == Method()
    paper = method_of(PAPER, "paper")
    assert (paper.policy.logit_scale, paper.policy.logit_bias) == ("1", None)
    assert (paper.training.lr, paper.training.updates, paper.training.sparsity_norm) == (0.1, 50, "raw")


def test_scales_by_name() -> None:
    scales = [PolicySection(logit_scale=one).scale(64) for one in ("1", "1/sqrt(d)", "4/d", 0.5)]
    assert scales == [1.0, 0.125, 0.0625, 0.5]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("polcy: {}", "polcy: unknown key; did you mean 'policy'?"),
        ("policy: {logit: gram}", "policy.logit: unknown key; did you mean 'policy.logits'?"),
        ("policy: {logits: grams}", "policy.logits='grams'"),
        ("policy: {logit_bias: .inf}", "policy.logit_bias=inf: beyond"),
        ("policy: {logit_scale: 2/d}", "policy.logit_scale='2/d'"),
        ("training: {batch: 1}", "training.batch=1"),
        ("training: {graphs: 0}", "training.graphs=0"),
        ("training: {lambda_sp: -1}", "training.lambda_sp=-1"),
        ("psi_clip: 0.5", "psi_clip=0.5"),
        ("encoder: {kind: minilm}", "encoder.folder: needed with kind=minilm"),
        ("encoder: {folder: x}", "encoder.folder: needed with kind=minilm"),
        ("refine_prompt: '{question} {own}'", "look at {others}"),
        ("refine_prompt: '{question} {own} {others} {x}'", "look at {x}"),
        ("refine_prompt: '{question} {own} {others} {'", "write {{ and }} for braces"),
        ("refine_prompt: '{question} {own.__class__} {others}'", "look at {own"),
        ("refine_prompt: '{question!r:>99999999} {own} {others}'", "without conversions"),
        ("- a", "expected sections"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(PhotonError) as raised:
        read_method(tmp_path / "m.yaml")
    assert why in str(raised.value)
    assert "m.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)
