"""Conversations: read by rows, written by a template, packed whole, the assistant's part marked."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer
from typer.testing import CliRunner

from photon.commands.app import app
from photon.data.chat_windows import ChatEncoder, Encoded, encode_chats, pack
from photon.data.chats import chat_of
from photon.data.documents import Chat, Message
from photon.data.prepare import prepare
from photon.data.prepared import PreparedData, array_file
from photon.data.separate import separate_silo
from photon.data.template import PLAIN, ChatTemplate, TemplateError
from photon.data.tokenizer import EosTokenizer, train_tokenizer
from photon.errors import PhotonError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}] {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)
#: One that writes earlier answers in another way than the last.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' and not loop.last %}..."
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def chat(*pairs: tuple[str, str]) -> Chat:
    found = chat_of({"messages": said(*pairs)}, "here", "messages")
    assert isinstance(found, Chat), found
    return found


def sums(count: int, seed: int = 0, turns: tuple[int, ...] = (1, 2, 3)) -> list[list[dict[str, str]]]:
    draw = random.Random(seed)
    chats = []
    for _ in range(count):
        pairs = [("system", "Add.")] if draw.random() < 0.3 else []
        for _ in range(draw.choice(turns)):
            a, b = draw.randint(0, 99), draw.randint(0, 99)
            pairs += [("user", f"What is {a} and {b}?"), ("assistant", f"It is {a + b}.")]
        chats.append(said(*pairs))
    return chats


def write(path: Path, chats: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> EosTokenizer:
    texts = [message["content"] for messages in sums(200) for message in messages]
    return train_tokenizer([*texts, "User:\nAssistant:\nSystem:\n" * 20], 320)


def with_marks(tokenizer: EosTokenizer) -> EosTokenizer:
    own = tokenizer.tokenizer.from_str(tokenizer.tokenizer.to_str())
    own.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    own.encode_special_tokens = True
    return EosTokenizer(own, "<|im_end|>", own.token_to_id("<|im_end|>"))


def encoder(tokenizer: EosTokenizer, folder: Path, template: str | None, length: int = 64) -> ChatEncoder:
    """Return an encoder as of a folder of Hugging Face with this template."""
    tokenizer.save(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return ChatEncoder(tokenizer, ChatTemplate.of(folder, tokenizer), length)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not an object"),
        ({"text": "x"}, "no field 'messages' with messages"),
        ({"messages": "hello"}, "holds a text, no list"),
        ({"messages": []}, "no message of the assistant"),
        ({"messages": said(("user", "hi"))}, "no message of the assistant"),
        ({"messages": ["hi"]}, "no object with role and content"),
        ({"messages": said(("wizard", "hi"), ("assistant", "x"))}, "unknown role 'wizard'"),
        ({"messages": [{"content": "hi"}]}, "unknown role null"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "unknown role a list"),
        ({"messages": [{"role": "user", "content": None}]}, "a message of the user holds null, no text"),
        ({"messages": said(("user", "hi"), ("assistant", "  "))}, "a message of the assistant: empty text"),
        ({"messages": said(("user", "a\0b"))}, "a message of the user: text holds a NUL byte"),
        ({"messages": said(("user", "\ud800"))}, "lone surrogate"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls tools"),
    ],
)
def test_a_row_without_a_conversation_says_why(row: Any, reason: str) -> None:
    found = chat_of(row, "here", "messages")
    assert isinstance(found, str)
    assert reason in found


def test_what_nobody_answers_is_left_out() -> None:
    found = chat(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert [message.content for message in found.messages] == ["a", "b"]
    assert found.source == "here"
    inner = chat_of({"x": {"y": said(("assistant", "b"))}, "who": "me"}, "here", "x.y", "who")
    assert isinstance(inner, Chat)
    assert inner.source == "me"


def test_the_plain_template_ends_each_answer_with_the_end_of_text(
    tokenizer: EosTokenizer, tmp_path: Path
) -> None:
    coder = encoder(tokenizer, tmp_path / "t", None)
    found, shortened = coder.encode(chat(("user", " What is 1? "), ("assistant", "It is.\n"), ("user", "x")))
    text = tokenizer.tokenizer.decode(found.ids, skip_special_tokens=False)
    assert text == "User:\nWhat is 1?\n\nAssistant:\nIt is.<|endoftext|>\n\n"
    learnt = [token for token, target in zip(found.ids, found.targets, strict=True) if target]
    assert tokenizer.tokenizer.decode(learnt, skip_special_tokens=False) == "It is.<|endoftext|>"
    assert learnt[-1] == tokenizer.eos_token_id
    assert not shortened


def test_a_template_of_the_tokenizer_is_written_as_transformers_writes_it(
    tokenizer: EosTokenizer, tmp_path: Path
) -> None:
    marked = with_marks(tokenizer)
    coder = encoder(marked, tmp_path / "t", CHATML)
    messages = said(("system", "Add."), ("user", "1 and 2?"), ("assistant", "It is 3."), ("user", "4 and 5?"))
    messages += said(("assistant", "It is 9."))
    found, _ = coder.encode(chat(*((m["role"], m["content"]) for m in messages)))
    coder.template.save(tmp_path / "t")
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert found.ids == theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    learnt = [token for token, target in zip(found.ids, found.targets, strict=True) if target]
    assert theirs.decode(learnt) == "It is 3.<|im_end|>It is 9.<|im_end|>"


def test_a_template_that_marks_answers_is_taken_at_its_word(tokenizer: EosTokenizer, tmp_path: Path) -> None:
    coder = encoder(tokenizer, tmp_path / "t", MARKED)
    messages = said(
        ("user", "1 and 2?"), ("assistant", "It is 3."), ("user", "4?"), ("assistant", "It is 4.")
    )
    found, _ = coder.encode(chat(*((m["role"], m["content"]) for m in messages)))
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "t")
    whole = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found.ids == whole["input_ids"]
    assert found.targets == [mask == 1 for mask in whole["assistant_masks"]]


@pytest.mark.parametrize(
    ("template", "message", "reason"),
    [
        ("{{ raise_exception('no system') }}", "x", "refuses it (no system)"),
        ("{{ messages[7].content }}", "x", "refuses it"),
        ("{% for %}", "x", "refuses it"),
        (FORGETFUL, "x", "does not begin a conversation as it begins a longer one"),
        ("nothing", "x", "writes nothing that the assistant says"),
        (None, "a <|endoftext|> b", "spells the special token <|endoftext|>"),
        (None, "word " * 99, "longer than a window by its last turn alone"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(
    template: str | None, message: str, reason: str, tokenizer: EosTokenizer, tmp_path: Path
) -> None:
    coder = encoder(tokenizer, tmp_path / "t", template)
    both = chat(("user", "hi"), ("assistant", "b"), ("user", message), ("assistant", "b"))
    with pytest.raises(TemplateError) as refused:
        coder.encode(both)
    assert reason in str(refused.value)


def test_a_long_conversation_loses_its_oldest_turns_and_keeps_the_system(
    tokenizer: EosTokenizer, tmp_path: Path
) -> None:
    coder = encoder(tokenizer, tmp_path / "t", None, 90)
    pairs = [("system", "Add.")]
    for turn in range(8):
        pairs += [
            ("user", f"What is {turn}?"),
            ("assistant", "It."),
            ("tool", "x"),
            ("assistant", f"So {turn}."),
        ]
    whole = chat(*pairs)
    found, shortened = coder.encode(whole)
    text = tokenizer.tokenizer.decode(found.ids, skip_special_tokens=False)
    assert shortened
    assert text.startswith("System:\nAdd.\n\nUser:\nWhat is ")
    kept = text.count("What is")
    assert 0 < kept < 8
    assert text.count("So ") == kept == text.count("Tool:")
    assert f"What is {8 - kept}?" in text
    # One turn more would not fit.
    more = ChatEncoder(tokenizer, coder.template, 10**6)
    longer = (whole.messages[0], *whole.messages[1 + 4 * (7 - kept) :])
    assert len(found.ids) <= 90 < len(more.encode(Chat("", "", longer))[0].ids)


def test_packing_cuts_no_conversation_and_marks_where_each_begins() -> None:
    draw = random.Random(0)
    encoded = []
    for value in range(1, 200):
        length = draw.randint(2, 16)
        encoded.append(Encoded([value] * length, [False] + [bool(draw.randint(0, 1))] * (length - 1)))
    packed = pack(encoded, 16, np.dtype(np.uint16), 0)
    assert packed.tokens.dtype == packed.positions.dtype == np.uint16
    seen = set()
    for tokens, positions, targets in zip(*packed, strict=True):
        starts = [*np.flatnonzero(positions == 0), 16]
        assert starts[0] == 0
        for first, last in pairwise(starts):
            value = int(tokens[first])
            assert positions[first:last].tolist() == list(range(last - first))
            if value == 0:
                assert last == 16, "what is left is filled at the end"
                assert not tokens[first:].any()
                assert not targets[first:].any()
                continue
            assert tokens[first:last].tolist() == encoded[value - 1].ids
            assert targets[first:last].tolist() == encoded[value - 1].targets
            seen.add(value)
    assert len(seen) == 199
    assert (packed.tokens == 0).mean() < 0.05, "little is left empty"


def test_the_first_token_of_a_conversation_is_predicted_from_nothing(
    tokenizer: EosTokenizer, tmp_path: Path
) -> None:
    bare = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    coder = encoder(tokenizer, tmp_path / "t", bare)
    found, _ = coder.encode(chat(("assistant", "It is 7.")))
    assert found.targets == [False] + [True] * (len(found.ids) - 1)
    with pytest.raises(TemplateError, match="writes nothing that the assistant says"):
        coder.encode(chat(("assistant", "a")))


def test_faults_of_conversations_are_counted(tokenizer: EosTokenizer, tmp_path: Path) -> None:
    coder = encoder(tokenizer, tmp_path / "t", None, 40)
    good = chat(("user", "hi"), ("assistant", "b"))
    bad = chat(("user", "<|endoftext|>"), ("assistant", "b"))
    long = chat(*(("user", "hi"), ("assistant", "It is 7.")) * 9)
    done = encode_chats([bad, good, long, bad], coder, lambda _: None)
    assert (done.used, done.shortened) == ([1, 2], 1)
    told = done.told()
    assert told[0].startswith("2 of 4 conversations: a message spells")
    assert told[1].startswith("1 of 2 conversations that are used: longer than a window")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    one = write(folder / "one.jsonl", [*sums(60), said(("user", "x"))])
    pq.write_table(pa.table({"messages": sums(60, 1)}), folder / "two.parquet")
    prepare(
        {"one": [one], "two": [folder / "two.parquet"]},
        folder / "data",
        kind="chat",
        vocab_size=300,
        sequence_length=64,
        validation_fraction=0.2,
        near_duplicates="none",
    )
    return folder / "data"


def test_prepared_conversations_are_whole_and_say_what_they_are(prepared: Path) -> None:
    data = PreparedData.open(prepared)
    data.verify()
    assert data.manifest.kind == "chat"
    assert (prepared / "tokenizer" / "chat_template.jinja").read_text() == PLAIN
    reasons = [skipped.reason for skipped in data.manifest.sources.skipped]
    assert reasons[0].startswith("1 of 61 rows: no message of the assistant")
    arrays = data.arrays("two", "train")
    entry = data.manifest.silos["two"].train
    assert entry.chat is not None
    assert arrays["targets"].sum() == entry.chat.targets > 0
    assert {array.shape for array in arrays.values()} == {(entry.sequences, 64)}
    # The unigram model is one of what is scored: the assistant's tokens alone.
    counts = [np.bincount(data.windows(s, "train")[data.arrays(s, "train")["targets"] == 1], minlength=300)
              for s in ("one", "two")]  # fmt: skip
    scored = data.windows("two", "validation")[data.arrays("two", "validation")["targets"] == 1]
    smoothed = (sum(counts) + 1) / (sum(counts) + 1).sum()
    assert data.manifest.silos["two"].unigram_loss == pytest.approx(-np.log(smoothed)[scored].mean())


@pytest.mark.parametrize("name", ["positions", "targets"])
def test_marks_that_have_changed_are_found(name: str, prepared: Path, tmp_path: Path) -> None:
    data = PreparedData.open(prepared)
    before = data.text_sha256(["one"])
    separate_silo(data, "one", tmp_path / "part")
    part = PreparedData.open(tmp_path / "part")
    part.verify()
    assert part.text_sha256(["one"]) == before
    file = array_file(tmp_path / "part", "one", "train", name)
    array = np.load(file)
    array[0, 3] += 1
    np.save(file, array)
    with pytest.raises(PhotonError, match=f"train-{name}.npy has changed"):
        PreparedData.open(tmp_path / "part").verify()
    file.unlink()
    with pytest.raises(PhotonError, match=f"train-{name}.npy is missing"):
        PreparedData.open(tmp_path / "part")


def test_a_share_has_the_marks_of_its_windows(prepared: Path) -> None:
    whole = PreparedData.open(prepared)
    for name, array in whole.dealt(2, 3).arrays("one-2", "train").items():
        assert np.array_equal(array, whole.arrays("one", "train")[name][1::3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "chat", "--embedded"], "--kind chat reads rows"),
        (["--kind", "story", "--silo", "a={file}"], "kind 'story' is not understood"),
        (["--kind", "chat", "--silo", "a={text}"], "plain text holds no messages"),
        (["--kind", "chat", "--silo", "a={file}", "--text-field", "chat"], "no field 'chat' with messages"),
        (["--kind", "chat", "--silo", "a={file}", "--sequence-length", "8", "--vocab-size", "300"],
         "silo 'a' has no train conversation that can be used: longer than a window by its last turn alone"),
    ],
)  # fmt: skip
def test_the_command_refuses_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    file, text = write(tmp_path / "a.jsonl", sums(40)), tmp_path / "a.txt"
    text.write_text("hello")
    given = [one.format(file=file, text=text) for one in arguments]
    output = ["--output", str(tmp_path / "data"), "--near-duplicates", "none"]
    result = CliRunner().invoke(app, ["data", "prepare", *output, *given])
    assert isinstance(result.exception, PhotonError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "data").exists()


def test_messages_are_what_templates_of_other_models_see(tokenizer: EosTokenizer, tmp_path: Path) -> None:
    """Tokens by name come from the tokenizer's own files, and stay in what is written."""
    folder = tmp_path / "t"
    tokenizer.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": {"content": "<s>"}, "chat_template": [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": "{{ bos_token }}" + CHATML.replace("<|im_end|>", "<|endoftext|>")},
    ]}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.of(folder / "tokenizer.json", tokenizer)
    text, spans = template.render([Message("user", "a"), Message("assistant", "b")])
    assert text.startswith("<s><|im_start|>user\na")
    assert [text[start:end] for start, end in spans] == ["b<|endoftext|>"]
    tokenizer.save(tmp_path / "out")
    template.save(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token == "<s>"
