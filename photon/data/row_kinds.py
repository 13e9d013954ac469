"""What a row becomes: a text, a conversation, a pair of answers, a question or a labelled text."""

from dataclasses import dataclass
from typing import Any

from photon.data.chats import chat_of
from photon.data.documents import Document, TextKind
from photon.data.labelled import labelled_of
from photon.data.pairs import FIELDS, pair_of
from photon.data.questions import FIELDS as QUESTION_FIELDS
from photon.data.questions import question_of
from photon.data.rows import document_of

#: Fields of rows that have fields of their own.
FIELDS_OF: dict[TextKind, tuple[str, ...]] = {"pairs": FIELDS, "questions": QUESTION_FIELDS}


@dataclass(frozen=True)
class RowReader:
    """Makes documents of rows, wherever these come from.

    Attributes
    ----------
    text_field
        Field or column that holds the text; a dot reaches into an inner object (``meta.text``).
    source_field
        Field or column whose value becomes the documents' ``source``.
    kind
        What the field holds: a text, or the messages of a conversation (`photon.data.chats.chat_of`). A pair
        has fields of its own (`photon.data.pairs.pair_of`), and so has a question
        (`photon.data.questions.question_of`).
    label_field
        Of texts with labels: field or column with the label.
    """

    text_field: str = "text"
    source_field: str | None = None
    kind: TextKind = "text"
    label_field: str | None = None

    @property
    def fields(self) -> list[str]:
        """The fields that are read."""
        own = FIELDS_OF.get(self.kind, (self.text_field,))
        return [*own, *(name for name in (self.source_field, self.label_field) if name)]

    def read(self, row: Any, place: str) -> Document | str:
        """Return the row's document, or the reason why it has none; ``place`` says where it lies."""
        if self.kind == "pairs":
            return pair_of(row, place, self.source_field)
        if self.kind == "questions":
            return question_of(row, place, self.source_field)
        if self.label_field is not None:
            return labelled_of(row, place, self.text_field, self.label_field, self.source_field)
        read = chat_of if self.kind == "chat" else document_of
        return read(row, place, self.text_field, self.source_field)
