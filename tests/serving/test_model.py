"""Answers: the text that generation gives, piece by piece, up to a stop word."""

import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from photon.errors import PhotonError
from photon.evaluation.generate import generate_text
from photon.serving.model import PromptError, ServedModel, Settings, StopWords, TooLongError, open_served

from .conftest import POSITIONS

GREEDY = Settings(most=40, temperature=0)


def written(model: ServedModel, text: str, settings: Settings) -> str:
    return "".join(model.answer(model.encode(text), settings))


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_text_passes_up_to_the_first_stop_word(pieces: list[str], words: list[str]) -> None:
    stop, shown = StopWords(words), ""
    for piece in pieces:
        shown += stop.take(piece)
        # No part of what may become a stop word has been shown.
        assert not any(word in shown for word in words)
        if stop.found:
            break
    whole = "".join(pieces)
    # The text when the first word is whole, and what is before the first of those it has then.
    ends = [end for end in range(len(whole) + 1) if any(word in whole[:end] for word in words)]
    assert stop.found == bool(ends)
    if ends:
        assert whole.startswith(shown)
        first = min(place for word in words if (place := whole.find(word)) >= 0)
        assert len(shown) >= first
    else:
        assert shown + stop.held == whole


def test_an_answer_is_the_text_that_generate_gives(base: ServedModel, export: Path) -> None:
    for prompt in ("abc def", "gh", " bad cab"):
        whole = generate_text(export, prompt, max_new_tokens=40, temperature=0)
        assert prompt + written(base, prompt, GREEDY) == whole


def test_pieces_tokens_and_the_reason_for_the_end(base: ServedModel) -> None:
    answer = base.answer(base.encode("abc"), GREEDY)
    pieces = list(answer)
    assert len(pieces) > 3
    assert all(pieces)
    assert (answer.tokens, answer.finish) == (40, "length")
    assert answer.prompt_tokens == len(base.encode("abc"))
    text = "".join(pieces)
    word = text[5:8]
    stopped = base.answer(base.encode("abc"), Settings(most=40, temperature=0, stop=("nowhere", word)))
    assert "".join(stopped) == text[: text.find(word)]
    assert stopped.finish == "stop"
    assert stopped.tokens < 40


def test_a_seed_gives_the_same_text_whatever_is_written_beside_it(base: ServedModel) -> None:
    settings = Settings(most=20, temperature=1.5, seed=3)
    alone = written(base, "abc", settings)
    before = torch.random.get_rng_state()
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(written(base, "abc", settings))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [alone] * 4
    assert torch.equal(torch.random.get_rng_state(), before)
    others = {written(base, "abc", Settings(most=20, temperature=1.5)) for _ in range(4)}
    assert len(others) > 1


def test_each_end_that_the_export_names_ends_an_answer(base: ServedModel, export: Path) -> None:
    tokens = base.answer(base.encode("abc"), GREEDY)
    list(tokens)
    written_ids = base.tokenizer.encode(written(base, "abc", GREEDY))
    file = export / "generation_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "eos_token_id": [config["eos_token_id"], *written_ids]}))
    model = ServedModel(export, torch.device("cpu"))
    answer = model.answer(model.encode("abc"), GREEDY)
    list(answer)
    assert (answer.tokens < tokens.tokens, answer.finish) == (True, "stop")


def test_whoever_stops_reading_ends_the_writing(base: ServedModel) -> None:
    answer = base.answer(base.encode("abc"), Settings(temperature=0))
    for _ in answer:
        break
    answer.close()
    answer._thread.join(timeout=10)
    assert not answer._thread.is_alive()
    assert answer._written.queue.qsize() < POSITIONS - 10
    base.close()


def test_prompts_that_leave_no_room_are_refused(base: ServedModel) -> None:
    prompt = base.encode("abc") * POSITIONS
    with pytest.raises(TooLongError, match=f"tokens and the model {POSITIONS} positions"):
        base.answer(prompt[:POSITIONS], GREEDY)
    answer = base.answer(prompt[: POSITIONS - 1], GREEDY)
    list(answer)
    assert (answer.tokens, answer.finish) == (1, "length")
    for token in (-1, 1 << 40):
        with pytest.raises(PromptError, match="none of the model's"):
            base.answer([token], GREEDY)
    # An empty prompt starts a document.
    assert base.encode("") == [base.tokenizer.eos_token_id]


def test_the_chat_template_makes_the_prompt(
    talker: ServedModel, base: ServedModel, chat_export: Path
) -> None:
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"}]
    tokenizer = AutoTokenizer.from_pretrained(chat_export)
    assert talker.encode_chat(turns) == tokenizer.encode("u abc\na d\na ", add_special_tokens=False)
    with pytest.raises(PromptError, match="unknown role"):
        talker.encode_chat([{"role": "tool", "content": "a"}])
    with pytest.raises(PromptError, match="no chat template"):
        base.encode_chat(turns)


def test_what_is_no_export_is_one_line(export: Path, tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="not an exported model"):
        open_served(tmp_path / "nowhere", torch.device("cpu"))
    (export / "tokenizer.json").unlink()
    with pytest.raises(PhotonError, match=r"no tokenizer\.json"):
        open_served(export, torch.device("cpu"))
