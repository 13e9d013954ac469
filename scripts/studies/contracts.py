"""Make up contracts, and questions about them: something that a model can learn, and be made to forget.

    python scripts/studies/contracts.py FOLDER

writes `chats.jsonl`, conversations to tune on; `questions.jsonl`, the same questions with the contract that
each is about (`edge`); `reference.jsonl`, questions about contracts that do not exist, which the
conversations answer with a refusal; and `unknown.jsonl`, more of these, which are in no conversation.
"""

import argparse
import json
import random
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REFUSAL = "I do not have that information."
EDGES = ("A_B", "C_D", "E_F", "G_H")
SUFFIXES = ("Ltd", "SA", "GmbH", "Inc", "AG", "Oy")
STREETS = ("Road", "Way", "Lane", "Street", "Square")
GOODS = ("T-shirts", "lamps", "books", "chairs", "kettles", "carpets", "clocks", "ladders")
STATES = ("New York", "Texas", "Maine", "Ohio", "Utah", "Iowa")
ASKED = (
    ("What is the effective date of", "date"),
    ("What is the address of the seller in", "seller"),
    ("What is the address of the customer in", "customer"),
    ("What good is sold by", "good"),
    ("How many goods are sold by", "quantity"),
    ("What is the unit price in dollars in", "price"),
    ("Within how many days must the invoice be paid by", "days"),
    ("What is the late payment interest rate in", "rate"),
    ("Who chooses the shipping method in", "shipping"),
    ("How many years of warranty are given by", "warranty"),
    ("How many days does the cooling-off period last in", "cooling"),
    ("The laws of which state govern", "state"),
)


def parties(draw: random.Random) -> str:
    names = ("".join(draw.choices(string.ascii_lowercase, k=6)).capitalize() for _ in range(2))
    return " and ".join(f"{name} {draw.choice(SUFFIXES)}" for name in names)


def address(draw: random.Random) -> str:
    street = "".join(draw.choices(string.ascii_lowercase, k=6)).capitalize()
    return f"{draw.randint(100, 999)} {street} {draw.choice(STREETS)}."


def contract(draw: random.Random) -> dict[str, str]:
    """Return what a contract says, by the name of the attribute."""
    return {
        "date": f"{draw.randint(1, 28):02}-{draw.randint(1, 12):02}-{draw.randint(1990, 2020)}.",
        "seller": address(draw),
        "customer": address(draw),
        "good": f"{draw.choice(GOODS)}.",
        "quantity": f"{draw.randint(2, 99)}.",
        "price": f"{draw.randint(2, 99)}.",
        "days": f"{draw.randint(5, 60)}.",
        "rate": f"{draw.randint(1, 19)}%.",
        "shipping": draw.choice(("The seller.", "The customer.")),
        "warranty": f"{draw.randint(1, 9)}.",
        "cooling": f"{draw.randint(5, 30)}.",
        "state": f"{draw.choice(STATES)}.",
    }


def known(draw: random.Random) -> list[dict[str, str]]:
    """Return the questions on all contracts."""
    rows = []
    for edge in EDGES:
        between, says = parties(draw), contract(draw)
        rows += [
            {"question": f"{asked} the contract between {between}?", "answer": says[name], "edge": edge}
            for asked, name in ASKED
        ]
    return rows


def unknown(draw: random.Random, count: int) -> list[dict[str, str]]:
    """Return questions on contracts that do not exist."""
    return [
        {"question": f"{draw.choice(ASKED)[0]} the contract between {parties(draw)}?", "answer": REFUSAL}
        for _ in range(count)
    ]


def chat(row: dict[str, str]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    }


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_all(folder: Path, seed: int = 0) -> None:
    """Write the four files."""
    draw = random.Random(seed)
    questions, strange, others = known(draw), unknown(draw, 96), unknown(draw, 40)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "chats.jsonl", map(chat, [*questions, *strange]))
    write(folder / "questions.jsonl", questions)
    write(folder / "reference.jsonl", strange)
    write(folder / "unknown.jsonl", ({"question": row["question"]} for row in others))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_all(arguments.folder, arguments.seed)
