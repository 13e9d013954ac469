import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from photon.commands import evaluation as cli
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.data.tokenizer import load_tokenizer
from photon.errors import PhotonError
from photon.evaluation.export import export_model, export_run
from photon.evaluation.generate import generate_text
from photon.evaluation.load import open_trained
from photon.evaluation.perplexity import evaluate_data, overall
from photon.files.atomic import write_text
from photon.models.build import build_model
from photon.state.checkpoint import CheckpointStore, LedgerEntry, ServerState
from photon.training.groups import read_params
from tests.conftest import composed


@pytest.fixture
def run(small_config: Callable[..., RunConfig], corpus: Path, tmp_path: Path) -> SimpleNamespace:
    """A run's folder with two checkpoints of different weights; the second is the one that counts."""
    config = small_config()
    manifest = PreparedData.open(corpus).manifest
    folder = tmp_path / "run"
    write_text(folder / "config.yaml", config.text)
    store = CheckpointStore(folder / "checkpoints")
    for server_round in (1, 2):
        model = build_model(config.model, manifest.vocab_size, seed=server_round)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5)  # so that the next token is not a coin toss
        state = ServerState(
            run_id="0",
            round=server_round,
            global_step=4 * server_round,
            tokens=12_345,
            ledger={"alpha": LedgerEntry(tokens=12_345)},
            vocab_size=manifest.vocab_size,
            sequence_length=manifest.sequence_length,
            tokenizer_sha256=manifest.tokenizer_sha256,
        )
        store.save(state, read_params(model), {})
    return SimpleNamespace(folder=folder, model=model.eval(), config=config, manifest=manifest, data=corpus)


@pytest.fixture
def exported(run: SimpleNamespace, tmp_path: Path) -> Path:
    export_run(run.folder, tmp_path / "export")
    return tmp_path / "export"


def test_the_export_gives_the_trained_logits_bit_for_bit(run: SimpleNamespace, exported: Path) -> None:
    tokens = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, run.model(tokens).logits)
    assert loaded.config.use_cache
    assert loaded.generation_config.eos_token_id == run.manifest.eos_token_id


def test_the_export_has_the_tokenizer_of_the_data(run: SimpleNamespace, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer.encode("abba cafe")) == "abba cafe"
    assert tokenizer.eos_token_id == run.manifest.eos_token_id
    own = (exported / "tokenizer.json").read_bytes()
    assert own == (run.data / "tokenizer" / "tokenizer.json").read_bytes()


#: What the converter of llama.cpp and vLLM's registry look for, by architecture.
READ_BY_OTHERS = {
    "GPT2LMHeadModel": ["n_layer", "n_ctx", "n_embd", "n_head", "layer_norm_epsilon", "vocab_size"],
    "LlamaForCausalLM": [
        *("num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size"),
        *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "head_dim", "vocab_size"),
    ],
}


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=tiny"],
        [
            "model=llama-135m",
            *(f"model.architecture.{key}" for key in ("num_hidden_layers=1", "hidden_size=18")),
            *(f"model.architecture.{key}" for key in ("intermediate_size=32", "num_key_value_heads=3")),
        ],
    ],
)
def test_other_programs_find_what_they_read(overrides: list[str], corpus: Path, tmp_path: Path) -> None:
    section, data = composed(*overrides, "model.sequence_length=32").model, PreparedData.open(corpus)
    size = section.vocab_size or data.manifest.vocab_size
    params = read_params(build_model(section, size, seed=0))
    export_model(params, section, size, data.tokenizer_path, tmp_path / "export", {})
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    (architecture,) = config["architectures"]
    assert [name for name in READ_BY_OTHERS[architecture] if config.get(name) is None] == []
    if architecture == "GPT2LMHeadModel":
        assert config["n_ctx"] == config["n_positions"] == 32
        # The converter counts on four times the width, and vLLM's class ends where one of these is set.
        assert config.get("n_inner") in (None, 4 * config["n_embd"])
        others = ("add_cross_attention", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
        assert not any(config.get(name) for name in others)
    else:
        # Both read the base of the rotation there.
        assert config["rope_parameters"]["rope_theta"] > 0


def test_clients_find_length_and_padding_and_may_read_the_files(run: SimpleNamespace, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export_run(run.folder, tmp_path / "export")
    finally:
        os.umask(before)
    exported = tmp_path / "export"
    assert {oct(file.stat().st_mode & 0o777) for file in exported.iterdir()} == {"0o640"}
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.model_max_length == run.model.config.max_position_embeddings
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    # What the tokenizer's own configuration says stays, and the tokens are those of the data.
    own = json.loads((run.data / "tokenizer" / "tokenizer_config.json").read_text())
    told = json.loads((exported / "tokenizer_config.json").read_text())
    assert {name: told[name] for name in own} == own
    assert (
        load_tokenizer(exported).tokenizer.to_str()
        == load_tokenizer(run.data / "tokenizer").tokenizer.to_str()
    )
    # Training goes on from it.
    section = composed("model=custom", f"model.warm_start={exported}", "model.sequence_length=16").model
    again = build_model(section, run.manifest.vocab_size, seed=0)
    for name, value in read_params(run.model).items():
        assert torch.equal(read_params(again)[name], value)


def test_the_card_states_the_facts(run: SimpleNamespace, tmp_path: Path) -> None:
    figures = {"initial": 290.0, "final": 12.34, "unigram": 99.5}
    summary = {"rounds": 2, "perplexity": figures | {"per_silo": {"alpha": figures | {"final": 11.11}}}}
    write_text(run.folder / "summary.json", json.dumps(summary))
    export_run(run.folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    for fact in (
        f"| parameters | {parameters:,} |",
        "| tokens trained | 12,345 |",
        "| alpha | 12,345 |",
        "| overall | 12.34 (before training 290.00, unigram model 99.50) |",
        "| alpha | 11.11 ",
        "AdamW(lr=",
        "## Licence",
    ):
        assert fact in card
    assert not re.search(r"^licen[cs]e:", card, re.MULTILINE)


def test_figures_of_another_round_are_not_in_the_card(run: SimpleNamespace, tmp_path: Path) -> None:
    write_text(run.folder / "summary.json", json.dumps({"rounds": 1, "perplexity": {}}))
    export_run(run.folder, tmp_path / "out")
    assert "perplexity" not in (tmp_path / "out" / "README.md").read_text()


def test_an_export_is_replaced_and_nothing_else(run: SimpleNamespace, exported: Path, tmp_path: Path) -> None:
    (exported / "README.md").write_text("old")
    export_run(run.folder, exported)
    assert "## Training" in (exported / "README.md").read_text()

    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(PhotonError, match=r"thesis\.tex"):
        export_run(run.folder, home)
    assert (home / "thesis.tex").read_text() == "years of work"
    (home / "thesis.tex").rename(home / "notes.json")
    with pytest.raises(PhotonError, match="other files"):
        export_run(run.folder, home)
    with pytest.raises(PhotonError, match="is a file"):
        export_run(run.folder, home / "notes.json")


def test_a_failed_export_leaves_nothing(run: SimpleNamespace, tmp_path: Path) -> None:
    params = read_params(run.model)
    params.pop("transformer.wpe.weight")
    with pytest.raises(PhotonError, match=r"transformer\.wpe\.weight"):
        export_model(
            params, run.config.model, run.manifest.vocab_size, run.data / "tokenizer", tmp_path / "out", {}
        )
    assert not (tmp_path / "out").exists()


def test_an_export_with_another_tokenizer_is_refused(
    run: SimpleNamespace, tmp_path: Path, small_config: Callable[..., RunConfig]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run.data, other)
    write_text(run.folder / "config.yaml", small_config(data=other).text)
    with open(other / "tokenizer" / "tokenizer.json", "a") as file:
        file.write("\n")
    with pytest.raises(PhotonError, match="not the tokenizer that the run was trained with"):
        export_run(run.folder, tmp_path / "out")
    (other / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(PhotonError, match="missing"):
        export_run(run.folder, tmp_path / "out")


def app() -> typer.Typer:
    both = typer.Typer()
    both.command()(cli.evaluate)
    both.command()(cli.generate)
    return both


def table_of(output: str) -> dict[str, list[str]]:
    rows = (line.split() for line in output.splitlines())
    return {row[0]: row[1:] for row in rows if len(row) == 5 and row[0] != "silo"}


def test_run_checkpoint_and_export_have_the_same_perplexity(run: SimpleNamespace, exported: Path) -> None:
    data = PreparedData.open(run.data)
    scores = evaluate_data(run.model, data, batch_size=8, device="cpu", precision="fp32", limit=8)
    expected = {silo: [f"{score.tokens:,}", f"{score.loss:.4f}"] for silo, score in scores.items()}
    expected["overall"] = [f"{overall(scores).tokens:,}", f"{overall(scores).loss:.4f}"]
    checkpoint = run.folder / "checkpoints" / "round-000002"
    for path in (run.folder, checkpoint, exported):
        arguments = ["evaluate", str(path), "--data", str(run.data), "--sequences", "8", "--device", "cpu"]
        result = CliRunner().invoke(app(), [*arguments, "--precision", "fp32"])
        assert result.exit_code == 0, result.output
        assert "computed in fp32" in result.output
        table = table_of(result.output)
        assert {name: row[:2] for name, row in table.items()} == expected
        for silo, entry in data.manifest.silos.items():
            assert table[silo][3] == f"{math.exp(entry.unigram_loss):,.2f}"
        # The same mixture of text as is scored: as many windows of each silo.
        each = sum(entry.unigram_loss for entry in data.manifest.silos.values()) / len(data.silo_names)
        assert table["overall"][3] == f"{math.exp(each):,.2f}"


def test_another_tokenizer_is_refused_by_evaluate(
    run: SimpleNamespace, exported: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run.data, other)
    manifest = json.loads((other / "manifest.json").read_text()) | {"tokenizer_sha256": "0" * 64}
    (other / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["evaluate", str(run.folder), "--data", str(other)]
    with pytest.raises(PhotonError, match="another tokenizer"):
        CliRunner().invoke(app(), arguments, catch_exceptions=False)
    # The export's own tokenizer.json shows that the two differ in layout alone.
    assert CliRunner().invoke(app(), ["evaluate", str(exported), "--data", str(other)]).exit_code == 0
    tokenizer = exported / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(PhotonError, match="another tokenizer"):
        CliRunner().invoke(app(), ["evaluate", str(exported), "--data", str(other)], catch_exceptions=False)


@pytest.mark.parametrize("option", ["device", "precision"])
def test_a_wrong_option_is_refused_before_model_and_data_are_read(tmp_path: Path, option: str) -> None:
    nothing = str(tmp_path)
    with pytest.raises(PhotonError, match=f"{option}=.?typo"):
        CliRunner().invoke(
            app(), ["evaluate", nothing, "--data", nothing, f"--{option}", "typo"], catch_exceptions=False
        )


def spoil(name: str, text: str | None) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink() if text is None else (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        ("nothing", lambda _: None, "no such folder"),
        ("empty", lambda folder: folder.mkdir(), "neither a run with checkpoints"),
        ("export", spoil("config.json", "{"), "config.json: not JSON"),
        (
            "export",
            spoil("config.json", '{"model_type": "nonsense"}'),
            "config.json: transformers refuses it",
        ),
        ("export", spoil("model.safetensors", None), "no *.safetensors"),
        ("export", spoil("model.safetensors", "x"), "cannot load the weights"),
        ("export", spoil("tokenizer.json", None), "no tokenizer.json"),
        ("run", spoil("config.yaml", None), "config.yaml: no such file"),
        ("run", spoil("config.yaml", "rounds: {"), "not a valid configuration"),
        ("checkpoint", spoil("checkpoint.json", "{}"), "checkpoint.json: damaged"),
        ("checkpoint", spoil("params.safetensors", "x"), "params.safetensors: cannot be read"),
        ("checkpoint", spoil("params.safetensors", None), "params.safetensors: cannot be read"),
    ],
)
def test_a_broken_folder_is_named(
    what: str,
    change: Callable[[Path], Any],
    message: str,
    run: SimpleNamespace,
    exported: Path,
    tmp_path: Path,
) -> None:
    checkpoint = run.folder / "checkpoints" / "round-000002"
    folder = {"export": exported, "run": run.folder, "checkpoint": checkpoint}.get(what, tmp_path / what)
    change(folder)
    with pytest.raises(PhotonError) as caught:
        open_trained(folder)
    assert message in str(caught.value)
    assert folder.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_generation_is_reproducible_and_leaves_the_random_state(exported: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    texts = [generate_text(exported, "abba", max_new_tokens=10, seed=seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    assert all(text.startswith("abba") for text in texts)
    assert torch.equal(before, torch.get_rng_state())


def test_temperature_zero_takes_the_likeliest_token(run: SimpleNamespace, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer.encode("abba")
    for _ in range(4):
        with torch.no_grad():
            tokens.append(int(run.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    assert generate_text(exported, "abba", max_new_tokens=4, temperature=0.0, seed=1) == expected


def test_text_ends_where_the_positions_do(run: SimpleNamespace, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = generate_text(exported, "", max_new_tokens=500, top_k=300, temperature=5.0)
    assert len(tokenizer.encode(text)) <= 500
    prompt = "abba cafe " * 20
    with pytest.raises(PhotonError, match=r"the model 16 positions; shorten the prompt"):
        generate_text(exported, prompt)
    words = tokenizer.decode(tokenizer.encode(prompt)[:15])
    assert generate_text(exported, words, max_new_tokens=500).startswith(words)


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": 0}])
def test_settings_without_meaning_are_refused(wrong: dict[str, Any], exported: Path) -> None:
    with pytest.raises(PhotonError, match="must be at least"):
        generate_text(exported, "abba", **wrong)


def test_generate_needs_a_tokenizer(exported: Path) -> None:
    (exported / "tokenizer.json").write_text("{")
    with pytest.raises(PhotonError, match="cannot load the tokenizer"):
        generate_text(exported, "abba")
    (exported / "tokenizer.json").unlink()
    with pytest.raises(PhotonError, match=r"no tokenizer\.json"):
        generate_text(exported, "abba")


def test_generate_prints_the_text(exported: Path) -> None:
    arguments = ["generate", str(exported), "--prompt", "abba", "--max-new-tokens", "3", "--device", "cpu"]
    result = CliRunner().invoke(app(), arguments)
    assert result.output.strip("\n") == generate_text(exported, "abba", max_new_tokens=3)


def test_a_run_writes_text_with_its_newest_model(
    run: SimpleNamespace, exported: Path, tmp_path: Path
) -> None:
    options = ["--prompt", "the", "--max-new-tokens", "4", "--device", "cpu"]
    expected = CliRunner().invoke(app(), ["generate", str(exported), *options])
    assert expected.exit_code == 0, expected.output
    own = CliRunner().invoke(app(), ["generate", str(run.folder), *options])
    assert own.exit_code == 0, own.output
    assert own.stdout == expected.stdout
    assert "round 2" in own.stderr
    checkpoint = CliRunner().invoke(
        app(), ["generate", str(run.folder / "checkpoints" / "round-000001"), *options]
    )
    assert checkpoint.exit_code == 0, checkpoint.output
    assert "round-000001: the checkpoint of round 1, exported for now" in checkpoint.stderr
    assert not list(run.folder.glob("checkpoints/*/config.json"))
    nothing = CliRunner().invoke(app(), ["generate", str(tmp_path), *options])
    assert "neither a run with checkpoints, nor a checkpoint, nor an exported model" in str(nothing.exception)
