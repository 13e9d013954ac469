"""An exported model that writes, piece by piece."""

import queue
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from photon.errors import PhotonError
from photon.evaluation.generate import COLDEST, cannot_write, check_temperature, is_text, load_tokenizer
from photon.evaluation.load import check_export, open_trained
from photon.models.pretrained import first_line, positions_of, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Message = Mapping[str, str]
"""One turn of a conversation: `role` and `content`."""


class PromptError(Exception):
    """A prompt that the model cannot take, and why."""


class TooLongError(PromptError):
    """A prompt that leaves the model no room for an answer."""


@dataclass(frozen=True)
class Settings:
    """How an answer is written.

    Attributes
    ----------
    most
        Most tokens; as many as the model has room for without it.
    temperature
        Divisor of the logits; 0 always takes the likeliest token.
    top_p
        Share of probability to choose from, the likeliest tokens first.
    top_k
        Tokens to choose among at each step; all without it.
    seed
        Of the choices; another one each time without it.
    stop
        Texts before which the answer ends.
    """

    most: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


class ServedModel:
    """An exported model and its tokenizer, ready to write one answer at a time.

    Attributes
    ----------
    name
        Name of its folder.
    positions
        Tokens of prompt and answer together, at most; None where there is no such bound.
    """

    def __init__(self, export: Path, device: torch.device) -> None:
        self.tokenizer = load_tokenizer(export)
        self.name = export.resolve().name
        self._model: PreTrainedModel = torch.nn.Module.to(open_trained(export).model, device).eval()
        self.positions = positions_of(self._model.config)
        self._turn = threading.Lock()
        self._export, self._ends = export, self._read_ends(export)

    def _read_ends(self, export: Path) -> list[int]:
        """Return the tokens that end an answer: the tokenizer's, and those that the model names."""
        own: Any = getattr(self._model.generation_config, "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        if not all(type(end) is int for end in ends):
            raise PhotonError(
                f"{export / 'generation_config.json'}: eos_token_id={own!r}: expected the number of a token, "
                "or several"
            )
        return sorted(ends)

    @property
    def has_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text to continue; an empty one starts a document.

        Raises
        ------
        PromptError
            If it is no text, or an empty one and there is no token that could stand for it.
        """
        _check_text(text)
        tokens: list[int] = self.tokenizer.encode(text)
        if tokens:
            return tokens
        if self.tokenizer.eos_token_id is None:
            raise PromptError("the tokenizer has no end-of-text token, so the prompt may not be empty")
        return [self.tokenizer.eos_token_id]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant begins to speak.

        Raises
        ------
        PromptError
            If the tokenizer has no chat template, or the template refuses the conversation.
        """
        if not self.has_chat:
            raise PromptError("the model has no chat template: it continues text and holds no conversations")
        for message in messages:
            _check_text(message["content"])
        try:
            made = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # templates raise what they like
            raise PromptError(f"the chat template refuses the conversation ({first_line(error)})") from error
        tokens: list[int] = made["input_ids"]
        return tokens

    def room(self, prompt: Sequence[int]) -> int:
        """Return how many tokens fit behind a prompt; fewer than one where it is too long."""
        return (1 << 30 if self.positions is None else self.positions) - len(prompt)

    def answer(self, prompt: Sequence[int], settings: Settings) -> "Answer":
        """Begin to write what follows a prompt.

        Raises
        ------
        TooLongError
            If the prompt leaves the model no room.
        PromptError
            If it has a token that the model does not know.
        """
        room = self.room(prompt)
        if room < 1:
            raise TooLongError(
                f"the prompt has {len(prompt)} tokens and the model {self.positions} positions; shorten it"
            )
        size = self._model.config.vocab_size
        if any(not 0 <= token < size for token in prompt):
            raise PromptError(f"the prompt has a token that is none of the model's {size}")
        return Answer(self, prompt, settings, min(room, settings.most or room))

    def write(self, prompt: Sequence[int], settings: Settings, most: int, to: "_Tokens") -> None:
        """Write an answer, in the thread that calls; others wait.

        Raises
        ------
        PhotonError
            If the model cannot write.
        """
        known = self._ends
        chosen: dict[str, Any] = {"do_sample": False}
        if settings.temperature > COLDEST:
            chosen = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
            chosen["top_k"] = settings.top_k or 0
        config = GenerationConfig(
            max_new_tokens=most, eos_token_id=known or None, pad_token_id=known[0] if known else 0, **chosen
        )
        device = self._model.device
        ids = torch.tensor([list(prompt)], device=device)
        gpus = [device] if device.type == "cuda" else []
        with self._turn, torch.random.fork_rng(gpus), torch.no_grad(), quiet_transformers():
            torch.manual_seed(secrets.randbits(63) if settings.seed is None else settings.seed)
            model: Any = self._model
            try:
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    streamer=to,
                    stopping_criteria=StoppingCriteriaList([to.wanted]),
                )
            except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
                raise cannot_write(self._export, self._model, error) from error

    def close(self) -> None:
        """Wait a little until nothing is being written: a thread must not run while the process ends."""
        self._turn.acquire(timeout=10)


class Answer:
    """What a model writes, as an iterator over pieces of text; a thread writes while it is read.

    Attributes
    ----------
    prompt_tokens, tokens
        How many the prompt has, and the answer so far.
    finish
        Why it ended: "stop", at the end of a text or before a stop word, or "length".
    """

    def __init__(self, model: ServedModel, prompt: Sequence[int], settings: Settings, most: int) -> None:
        self.prompt_tokens, self.tokens, self.finish = len(prompt), 0, "stop"
        self._most = most
        self._decoder = _Decoder(model.tokenizer, prompt)
        self._stop = StopWords(settings.stop)
        self._written = _Tokens()
        self._thread = threading.Thread(
            target=self._write, args=(model, prompt, settings, most), name="answer", daemon=True
        )
        self._thread.start()

    def _write(self, model: ServedModel, prompt: Sequence[int], settings: Settings, most: int) -> None:
        try:
            model.write(prompt, settings, most, self._written)
        except Exception as error:  # it belongs to the thread that reads
            self._written.queue.put(error)
        else:
            self._written.queue.put(None)

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text; none is empty, and none has a part of a stop word."""
        try:
            yield from self._pieces()
        finally:
            self.close()

    def _pieces(self) -> Iterator[str]:
        while True:
            token = self._written.queue.get()
            if token is None:
                break
            if isinstance(token, Exception):
                raise token
            self.tokens += 1
            piece = self._stop.take(self._decoder.take(token))
            if piece:
                yield piece
            if self._stop.found:
                return
        self.finish = "length" if self.tokens >= self._most else "stop"
        rest = self._stop.take(self._decoder.rest())
        if rest := rest if self._stop.found else rest + self._stop.held:
            yield rest

    def close(self) -> None:
        """Let the writing end, which takes a token more at most."""
        self._written.wanted.no_longer = True


class _Wanted(StoppingCriteria):
    """Ends a generation that nobody reads any more."""

    def __init__(self) -> None:
        self.no_longer = False

    def __call__(self, input_ids: torch.Tensor, scores: object, **_kwargs: object) -> torch.BoolTensor:
        answer: Any = torch.full_like(input_ids[:, 0], self.no_longer, dtype=torch.bool)
        return answer


class _Tokens(BaseStreamer):
    """Hands over tokens as they are written; the first that arrive are the prompt's."""

    def __init__(self) -> None:
        self.queue: queue.Queue[int | Exception | None] = queue.Queue()
        self.wanted = _Wanted()
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take tokens."""
        if not self._is_prompt:
            for token in value.reshape(-1).tolist():
                self.queue.put(token)
        self._is_prompt = False

    def end(self) -> None:
        """Do nothing: the thread says when it has ended, and how."""


class _Decoder:
    """Makes text of tokens as they come, behind those of a prompt.

    A character may be split between tokens, and what a token means may depend on the one before: so tokens
    are decoded together with those that were shown last, and wait while they end within a character.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._shown, self._waiting = list(prompt), list[int]()

    def take(self, token: int) -> str:
        """Return the text that has become whole by a token."""
        self._waiting.append(token)
        text = self.rest()
        if not text or text.endswith("\ufffd"):
            return ""
        self._shown, self._waiting = self._waiting, []
        return text

    def rest(self) -> str:
        """Return the text of the tokens that wait, whole or not."""
        before, after = (
            self._tokenizer.decode(tokens, skip_special_tokens=True)
            for tokens in (self._shown, self._shown + self._waiting)
        )
        return str(after)[len(before) :]


def _check_text(text: str) -> None:
    if not is_text(text):
        raise PromptError("it has half of a character (a lone surrogate), which is no text; leave it out")


class StopWords:
    """Lets text pass up to the first of some words, and holds back what may become one.

    Attributes
    ----------
    held
        Text that may be the beginning of a word.
    found
        Whether a word has come.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [word for word in words if word]
        self.held = ""
        self.found = False

    def take(self, piece: str) -> str:
        """Return what may be shown now that a piece has come."""
        text, self.held = self.held + piece, ""
        places = [place for word in self._words if (place := text.find(word)) >= 0]
        if places:
            self.found = True
            return text[: min(places)]
        for start in range(max(0, len(text) - max(map(len, self._words), default=0) + 1), len(text)):
            if any(word.startswith(text[start:]) for word in self._words):
                self.held = text[start:]
                return text[:start]
        return text


def open_served(export: Path, device: torch.device) -> ServedModel:
    """Open an exported model.

    Raises
    ------
    PhotonError
        If the folder is not an export, or damaged.
    """
    check_export(export)
    return ServedModel(export, device)
