"""The chat template: how a conversation becomes one text, and which part of it the assistant says."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from photon.data.documents import Message
from photon.data.tokenizer import EosTokenizer, declared
from photon.errors import PhotonError, printable

#: Who may speak.
Role = Literal["system", "user", "assistant", "tool"]
NAME = "chat_template.jinja"

#: For a model that has none. It needs no token that a vocabulary may lack: names, and the end of text after
#: each of the assistant's turns.
PLAIN = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'Assistant:\\n' + message['content'] | trim + eos_token + '\\n\\n' }}
{%- else -%}
{{ message['role'] | capitalize + ':\\n' + message['content'] | trim + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'Assistant:\\n' }}
{%- endif -%}
"""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
"""First character, and the one after the last."""


class TemplateError(Exception):
    """A template that refuses a conversation, or does not show what is the assistant's; the text says why."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template of transformers, with the tokens that it writes by name.

    Attributes
    ----------
    source
        The template, in Jinja.
    special_tokens
        ``bos_token``, ``eos_token`` and so on, as a tokenizer has them.
    marks
        Special tokens, without which the end of a turn would be a line break.
    """

    source: str
    special_tokens: Mapping[str, str]
    marks: frozenset[str]

    @classmethod
    def of(cls, path: Path | None, tokenizer: EosTokenizer) -> "ChatTemplate":
        """Return the template beside a tokenizer, or the plain one.

        Parameters
        ----------
        path
            What the tokenizer was loaded from; None: it was trained here.
        tokenizer
            The tokenizer.

        Raises
        ------
        PhotonError
            If a file beside the tokenizer cannot be read.
        """
        special = {"bos_token": tokenizer.eos_token, "unk_token": tokenizer.eos_token}
        source = None
        if path is not None:
            source = _beside(path)
            found = {name: _content(declared(path, name)) for name in _SPECIAL}
            # Of a model with a template of its own, a token that is not there is not written.
            special = {name: token for name, token in found.items() if token is not None} or special
        special["eos_token"] = tokenizer.eos_token
        return cls(source or PLAIN, special, frozenset(tokenizer.special_tokens()))

    def render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Return a conversation as text, and the spans in it that the assistant says.

        They are what the template puts between ``{% generation %}`` and its end. Where it has none, each is
        what follows the prompt for an answer, up to the mark that ends the turn.

        Raises
        ------
        TemplateError
            If the template refuses it, or does not begin a conversation as it begins a longer one.
        """
        if _GENERATION.search(self.source):
            return self._rendered(messages, spans=True)
        text, _ = self._rendered(messages)
        spans = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt, _ = self._rendered(messages[:index], prompt=True)
            turn = text if index + 1 == len(messages) else self._rendered(messages[: index + 1])[0]
            if not (text.startswith(turn) and turn.startswith(prompt)):
                raise TemplateError(
                    "the template does not begin a conversation as it begins a longer one, and marks no "
                    "answer with {% generation %}"
                )
            # The line break after a mark is no answer; without a mark it is what ends one.
            trimmed = turn.rstrip()
            ends_marked = any(trimmed.endswith(mark) for mark in self.marks)
            spans.append((len(prompt), len(trimmed) if ends_marked else len(turn)))
        return text, spans

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return a conversation as text, up to where the assistant begins to speak.

        Raises
        ------
        TemplateError
            If the template refuses it.
        """
        return self._rendered(messages, prompt=True)[0]

    def _rendered(
        self, messages: Sequence[Message], *, prompt: bool = False, spans: bool = False
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        said = [{"role": message.role, "content": message.content} for message in messages]
        tokens: dict[str, Any] = dict(self.special_tokens)
        try:
            # It runs in a sandbox.
            rendered: Any = render_jinja_template(
                [said],
                chat_template=self.source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                **tokens,
            )
        except Exception as error:  # a template has filters and arithmetic of its own
            said_why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TemplateError(f"the template refuses it ({printable(said_why):.200})") from None
        texts, found = rendered
        return texts[0], [tuple(span) for span in found[0]] if spans else []

    def save(self, folder: Path) -> None:
        """Write the template into the folder of a saved tokenizer, with the tokens that it writes."""
        (folder / NAME).write_text(self.source, encoding="utf-8")
        file = folder / "tokenizer_config.json"
        config = {**json.loads(file.read_text(encoding="utf-8")), **self.special_tokens}
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _beside(path: Path) -> str | None:
    file = (path if path.is_dir() else path.parent) / NAME
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PhotonError(f"{printable(file)} cannot be read ({printable(error)})") from None
    found = declared(path, "chat_template")
    if isinstance(found, list):
        # A file may name several; the one that transformers takes is called so.
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found.strip() else None


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
