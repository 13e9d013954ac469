"""Exported models that know no more than chance, with room for conversations."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.evaluation.export import export_model
from photon.models.build import build_model
from photon.serving.model import ServedModel
from photon.training.groups import read_params

POSITIONS = 256

#: A template as small as one can be: a letter for who speaks, and a line for what is said.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role') }}"
    "{% endif %}"
    "{{ message.role[0] }} {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture
def export(corpus: Path, small_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """An exported base model."""
    section = small_config(f"model.sequence_length={POSITIONS}").model
    data = PreparedData.open(corpus)
    params = read_params(build_model(section, data.manifest.vocab_size, seed=0))
    draw = torch.Generator().manual_seed(0)
    params = {name: value + 0.2 * torch.randn(value.shape, generator=draw) for name, value in params.items()}
    export_model(params, section, data.manifest.vocab_size, data.tokenizer_path, tmp_path / "base", {})
    return tmp_path / "base"


@pytest.fixture
def chat_export(export: Path) -> Path:
    """The same with a chat template."""
    talker = export.with_name("talker")
    shutil.copytree(export, talker)
    (talker / "chat_template.jinja").write_text(TEMPLATE)
    return talker


@pytest.fixture
def base(export: Path) -> ServedModel:
    return ServedModel(export, torch.device("cpu"))


@pytest.fixture
def talker(chat_export: Path) -> ServedModel:
    return ServedModel(chat_export, torch.device("cpu"))
