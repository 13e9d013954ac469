"""What would end a run in its first round, or at its end, is said before anything starts."""

import os
from pathlib import Path

import pytest

from photon.errors import PhotonError
from photon.federation.run import check_run_dir, prepare_run
from photon.models.build import build_model
from photon.silo import choice
from tests.conftest import small_run


def test_a_batch_that_no_silo_of_this_machine_can_hold(corpus: Path, tmp_path: Path) -> None:
    config = small_run("training.batch_size=999999999999", data=corpus, run_dir=tmp_path)
    with pytest.raises(PhotonError, match=r"lower training\.micro_batch_size or training\.batch_size"):
        prepare_run(config)


@pytest.mark.parametrize("name", [".lock", "summary.json", "events.jsonl"])
def test_a_folder_in_the_place_of_a_file(corpus: Path, tmp_path: Path, name: str) -> None:
    config = prepare_run(small_run(data=corpus, run_dir=tmp_path))
    (tmp_path / name).mkdir()
    with pytest.raises(PhotonError, match="is no file, and a run keeps one there; move it away"):
        check_run_dir(config, resume=False)


def test_a_pipe_in_the_place_of_a_folder(corpus: Path, tmp_path: Path) -> None:
    config = prepare_run(small_run(data=corpus, run_dir=tmp_path))
    os.mkfifo(tmp_path / "silos")
    with pytest.raises(PhotonError, match="silos: is no folder"):
        check_run_dir(config, resume=False)


def test_a_model_without_enough_memory(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **_others: object) -> None:
        raise RuntimeError("x: can't allocate memory: y")

    config = small_run(data=corpus, run_dir=tmp_path)
    monkeypatch.setattr("photon.models.build.AutoModelForCausalLM.from_config", fails)
    with pytest.raises(PhotonError, match=r"not the memory for it, with model\.sequence_length="):
        build_model(config.model, 300, seed=0)


def test_the_whole_model_is_timed_where_a_smaller_one_cannot_be_built(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(data=corpus, run_dir=tmp_path)
    smaller = config.model.model_copy(update={"vocab_size": 64})
    trained = choice._trained

    def refuses(config: object, vocab_size: int) -> object:
        if vocab_size == 1:
            raise PhotonError("its layers are not all alike")
        return trained(config, vocab_size)  # type: ignore[arg-type]

    monkeypatch.setattr(choice, "_PASS_FLOPS", 1.0)
    monkeypatch.setattr(choice, "_trained", refuses)
    monkeypatch.setattr(choice, "_with_fewer_layers", lambda model, rows: smaller)
    model, _ = choice._model(config, 300)
    assert model.config.vocab_size >= 300
