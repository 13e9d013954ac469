"""Which key blocks travel to other federations, and to whom."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from photon.models.build import build_model
from photon.state.checkpoint import Checkpoint, CheckpointStore, ServerState
from photon.state.tensors import StateGroups
from photon.strategy.base import Participant, Reply, strategy_of
from photon.strategy.key_layers import RoutedBlock, pack_routed, routed_group
from photon.strategy.worldlm import WorldLM
from photon.training.groups import read_params
from tests.conftest import SMALL, composed
from tests.samples import train_report

RULES = [
    "strategy=worldlm",
    "strategy.key_fraction=0.5",
    "strategy.attention.score=cosine",
    "model.architecture.n_layer=2",
]
CHILDREN = ("a", "b", "c")


@pytest.fixture(scope="module")
def strategy() -> WorldLM:
    found = strategy_of(composed(*SMALL, "data.path=none", *RULES))
    assert isinstance(found, WorldLM)
    return found


@pytest.fixture(scope="module")
def params(strategy: WorldLM) -> dict[str, Tensor]:
    return {
        name: t.clone() for name, t in read_params(build_model(strategy.config.model, 300, seed=0)).items()
    }


def keys(strategy: WorldLM, params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: params[name] for name in strategy.layers.split(params).key_names}


def turned(block: dict[str, Tensor], share: float, seed: int) -> dict[str, Tensor]:
    """Return a block that has ``share`` of another and is chance for the rest."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: share * tensor + (1 - share) * 0.02 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in block.items()
    }


def checkpoint_of(
    folder: Path, params: dict[str, Tensor], kept: StateGroups, routed: list[RoutedBlock]
) -> Checkpoint:
    groups, tags = pack_routed(routed)
    state = ServerState(
        run_id="r",
        round=1,
        global_step=4,
        tokens=4,
        vocab_size=300,
        sequence_length=16,
        tokenizer_sha256="0",
        routed=tags,
    )
    store = CheckpointStore(folder / "checkpoints")
    with store.writing(state, dict(params), {}, {}, kept={**kept, **groups}):
        pass
    return store.load(1)


@pytest.mark.parametrize("alike", ["a", "b"])
def test_a_routed_block_goes_to_the_child_that_it_is_most_like(
    alike: str, strategy: WorldLM, params: dict[str, Tensor], tmp_path: Path
) -> None:
    own = keys(strategy, params)
    block = next(iter(strategy.layers.split(params).keys))
    travels = RoutedBlock(block, "c", 1, turned(own, 0.0, 9))
    children = {
        "a": turned(own, 0.0, 1),
        "b": turned(own, 0.0, 2),
        "c": travels.tensors,  # it never goes back to where it is from
    }
    children[alike] = turned(dict(travels.tensors), 0.7, 3)
    kept = {f"local/child:{name}": dict(tensors) for name, tensors in children.items()}
    checkpoint = checkpoint_of(tmp_path, params, kept, [travels])
    told = {child: strategy.routed_tags(checkpoint, child) for child in CHILDREN}
    assert [child for child in CHILDREN if told[child]] == [alike]
    assert told[alike][0].origin == "c"
    cohort = [Participant(child, (child,), 4) for child in CHILDREN]
    sent = strategy.configure_train(2, checkpoint, cohort)
    for child in CHILDREN:
        assert (routed_group(1) in sent[child]) == (child == alike)
    found = sent[alike][routed_group(1)]
    assert all(torch.equal(found[name], tensor) for name, tensor in travels.tensors.items())


@pytest.mark.parametrize("odd", CHILDREN)
def test_the_block_least_like_the_nodes_new_one_travels_on(
    odd: str, strategy: WorldLM, params: dict[str, Tensor], tmp_path: Path
) -> None:
    own = keys(strategy, params)
    trained = {
        child: turned(own, 0.1 if child == odd else 0.8, seed) for seed, child in enumerate(CHILDREN, 1)
    }

    def replies() -> Iterator[Reply]:
        for child in CHILDREN:
            yield Reply(child, train_report(silo=child), {"params": {**params, **trained[child]}}, 0, {})

    aggregate = strategy.aggregate_train(2, checkpoint_of(tmp_path, params, {}, []), replies())
    assert [tag.origin for tag in aggregate.routed] == [odd]
    found = aggregate.kept[routed_group(1)]
    assert all(torch.equal(found[name], tensor) for name, tensor in trained[odd].items())
