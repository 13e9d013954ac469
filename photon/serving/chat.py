"""A conversation in the terminal."""

from collections.abc import Callable, Iterator

from photon.engine.signals import heard
from photon.errors import PhotonError
from photon.serving.model import Message, PromptError, ServedModel, Settings

Say = Callable[[str], None]


class Conversation:
    """What has been said, as much as the model can take.

    A model with a chat template is given turns; the oldest are forgotten where they no longer fit, by whole
    turns, and what the system said never. A model without one is given the text so far, which it continues.
    """

    def __init__(self, model: ServedModel, settings: Settings, system: str | None, say: Say) -> None:
        if system is not None and not model.has_chat:
            raise PhotonError(f"--system needs a chat template, and {model.name} has none; leave it out")
        self._model, self._settings, self._say = model, settings, say
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []
        self._text = ""
        # Tokens that an answer may always have.
        positions = model.positions or 1 << 30
        self._least = min(settings.most or positions, max(1, positions // 4))

    def answer(self, said: str) -> Iterator[str]:
        """Yield the answer to what was said, in pieces; both belong to the conversation, if it was begun.

        Raises
        ------
        PromptError
            If the model cannot take it; the conversation is as before.
        """
        prompt = self._prompt_of_turns(said) if self._model.has_chat else self._prompt_of_text(said)
        answer = self._model.answer(prompt, self._settings)
        told: list[str] = []
        try:
            for piece in answer:
                told.append(piece)
                yield piece
        finally:
            answer.close()
            if self._model.has_chat:
                self._turns.append({"role": "assistant", "content": "".join(told)})
            else:
                self._text += "".join(told)

    def _prompt_of_turns(self, said: str) -> list[int]:
        turns = [*self._turns, {"role": "user", "content": said}]
        prompt = self._model.encode_chat([*self._system, *turns])
        forgotten = 0
        while self._model.room(prompt) < self._least and len(turns) > 1:
            # What the user said and what was answered: templates want turns to alternate.
            turns, forgotten = turns[2:], forgotten + 2
            prompt = self._model.encode_chat([*self._system, *turns])
        if self._model.room(prompt) < 1:
            raise PromptError(
                f"{len(prompt)} tokens are more than the model's {self._model.positions}; say less"
            )
        if forgotten:
            self._say(f"({forgotten} older turns no longer fit and are forgotten)")
        self._turns = turns
        return prompt

    def _prompt_of_text(self, said: str) -> list[int]:
        text = f"{self._text}\n{said}" if self._text and said else self._text + said
        prompt = self._model.encode(text)
        over = self._least - self._model.room(prompt)
        self._text = text
        return prompt[over:] if over > 0 else prompt


def converse(conversation: Conversation, ask: Callable[[], str], say: Say) -> None:
    """Hold a conversation until there is nothing more to read.

    Parameters
    ----------
    conversation
        What is said belongs to it.
    ask
        Returns what the user says, or raises ``EOFError``.
    say
        Shows a line of ours, or a piece of an answer with its line ends.
    """
    while True:
        try:
            said = ask()
        except EOFError:
            return
        try:
            for piece in conversation.answer(said):
                say(shown(piece))
        except PromptError as error:
            say(f"({error})")
        except KeyboardInterrupt:
            # It ends the answer; at the prompt it ends the command.
            heard()
        say("\n")


def shown(text: str) -> str:
    """Return a model's text as a terminal may have it: what could steer the terminal is escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
