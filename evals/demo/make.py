"""Write the demo data set: messy expense messages and the one-line JSON that files them.

Invariant: the rows depend on ``SEED`` alone (``random.random`` is stable across Python versions);
no test row shares its message, its answer, its sentence pattern or the name of its companion with a
training row, so the held-out score cannot come from memory. Try it: ``python evals/demo/make.py``
rewrites ``train.jsonl`` and ``test.jsonl`` beside this file, unchanged.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

SEED = 20250
TRAIN_ROWS = 720
TEST_ROWS = 100

T = TypeVar("T")


def words(text: str) -> list[str]:
    """Return the words of ``text``."""
    return text.split()


ITEMS = {
    "food": ["lunch", "coffee", "pizza", "groceries", "breakfast", "sandwiches"],
    "travel": ["taxi", "train ticket", "parking", "fuel", "flight", "hotel"],
    "home": ["rent", "electricity", "light bulbs", "furniture", "water bill", "curtains"],
    "health": ["dentist", "vitamins", "glasses", "massage", "pharmacy", "doctor visit"],
    "fun": ["cinema", "concert", "museum", "board game", "bowling", "theatre"],
    "work": ["printer paper", "stamps", "notebook", "keyboard", "business cards", "software"],
}

# Spellings of a currency: those written after the number, and those glued in front of it.
AFTER = {
    "EUR": ["eur", "EUR", "euros", "euro", "€"],
    "USD": ["usd", "USD", "dollars", "bucks", "$"],
    "GBP": ["gbp", "GBP", "pounds", "quid", "£"],
    "JPY": ["jpy", "JPY", "yen", "¥"],
    "CHF": ["chf", "CHF", "francs", "swiss francs"],
    "INR": ["inr", "INR", "rupees", "rs"],
}
FRONT = {"EUR": "€", "USD": "$", "GBP": "£", "JPY": "¥", "CHF": "CHF ", "INR": "₹"}
WORDS = {"EUR": "euros", "USD": "dollars", "GBP": "pounds", "JPY": "yen", "CHF": "francs"}
WORDS["INR"] = "rupees"

DAYS = {
    "mon": ["mon", "monday", "on monday", "last monday"],
    "tue": ["tue", "tuesday", "on tuesday", "tues"],
    "wed": ["wed", "wednesday", "on wednesday", "last wed"],
    "thu": ["thu", "thursday", "on thursday", "thurs"],
    "fri": ["fri", "friday", "on friday", "last friday"],
    "sat": ["sat", "saturday", "on saturday", "last sat"],
    "sun": ["sun", "sunday", "on sunday", "last sunday"],
    "today": ["today", "this morning", "tonight", "just now"],
    "yesterday": ["yesterday", "yday", "last night", "yest"],
}

TRAIN_NAMES = words(
    """
    Maria Tom Aisha Ken Olga Pedro Lena Sam Nina Omar Julia Ravi Emma Luca Chloe Ivan Sofia Ben
    Mei Paul Anna Hugo Zara Felix Clara Yusuf Laura Max Rosa David Peter Fatima Liam Hana Carlos
    Ingrid Noah Leila Oscar Yuki Martin Elena Jack Amina Simon Grace Mateo Ella Karim Sarah
    Viktor Lucia Adam Nadia Leo Tessa Rahul Eva Daniel Ada Mark Isabel Tariq Helen Bruno Lily
    Kofi Marta Eric Jade Nils Carmen Dev Monica Theo Salma Robert Ines Kai Wanda Louis Petra
    Arjun Molly
    """
)
TEST_NAMES = words("Hannah Amir Holly Jonas Priya Marco Ruth Diego Alice Stefan Noor Victor")

# {w} is the companion with its "with", {d} the day; either may be absent.
TRAIN_PATTERNS = [
    "{i} {a} {w} {d}",
    "{a} {i} {w} {d}",
    "{d} {i} {a} {w}",
    "{d} {w} {i} {a}",
    "paid {a} for {i} {w} {d}",
    "spent {a} on {i} {d} {w}",
    "{i} cost me {a} {d} {w}",
    "{d} I paid {a} for {i} {w}",
    "hey, pls add {i}, {a}, {w} {d}",
    "{i} {w}, {a}, {d}",
    "{i} = {a} {w} {d} thx",
    "can you log {a} for {i} {w} {d}?",
    "note: {d} {i} {w} was {a}",
    "{a} gone on {i} {d} {w}",
    "had {i} {w} {d}, {a} in total",
    "{w} {d}: {i}, {a}",
]
TEST_PATTERNS = [
    "{d} I spent {a} on {i} {w}",
    "pls log {i} {d}, {a} {w}",
    "{i} {d} {w} - {a}",
    "hi! {a} for {i} {d} {w} thanks",
    "just paid {a}, {i} {w} {d}",
    "{w} {i} {d} cost {a}",
]

ONES = words(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen
    """
)
TENS = words("zero ten twenty thirty forty fifty sixty seventy eighty ninety")


def pick(rng: random.Random, choices: Sequence[T]) -> T:
    """Return one of ``choices``."""
    return choices[int(rng.random() * len(choices))]


def in_words(number: int) -> str:
    """Return 0 … 99 in English words."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f" {ONES[ones]}" if ones else "")


def money(rng: random.Random, currency: str) -> tuple[str, str]:
    """Return an amount as somebody types it, and in canonical form (two decimals)."""
    if currency == "JPY":
        value, cents = 100 * (1 + int(rng.random() * 90)), 0
    else:
        value = 1 + int(rng.random() * (99 if rng.random() < 0.75 else 400))
        cents = 0 if rng.random() < 0.5 else 5 * (1 + int(rng.random() * 19))
    canonical = f"{value}.{cents:02d}"
    style = rng.random()
    if style < 0.3 and value < 100 and not cents:
        return f"{in_words(value)} {WORDS[currency]}", canonical
    number = f"{value}{pick(rng, ['.', '.', ','])}{cents:02d}" if cents else str(value)
    if style < 0.55:
        return f"{FRONT[currency]}{number}", canonical
    unit = pick(rng, AFTER[currency])
    return f"{number}{pick(rng, [' ', ' ', ''])}{unit}", canonical


def typo(rng: random.Random, text: str) -> str:
    """Swap two letters of ``text`` or double one, past the third letter of a word."""
    places = [k for k in range(3, len(text) - 1) if text[k - 3 : k + 2].isalpha()]
    if not places:
        return text
    k = pick(rng, places)
    if rng.random() < 0.5:
        return text[:k] + text[k + 1] + text[k] + text[k + 2 :]
    return text[:k] + text[k] + text[k:]


def make_row(rng: random.Random, patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return one row: ``prompt`` the message, ``completion`` the answer."""
    category = pick(rng, list(ITEMS))
    item = pick(rng, ITEMS[category])
    currency = pick(rng, list(FRONT))
    spelled, amount = money(rng, currency)
    who = pick(rng, names) if rng.random() < 0.6 else None
    day = pick(rng, list(DAYS)) if rng.random() < 0.7 else None
    message = pick(rng, patterns).format(
        i=typo(rng, item) if rng.random() < 0.15 else item,
        a=spelled,
        w=f"{pick(rng, ['with', 'with', 'w/'])} {who}" if who else "",
        d=pick(rng, DAYS[day]) if day else "",
    )
    message = " ".join(message.replace(" ,", ",").split()).strip(" ,:-")
    style = rng.random()
    if style < 0.25:
        message = message.lower()
    elif style < 0.28:
        message = message.upper()
    elif style < 0.6:
        message = message[0].upper() + message[1:]
    answer = {
        "item": item,
        "amount": amount,
        "currency": currency,
        "category": category,
        "with": who,
        "day": day,
    }
    completion = json.dumps(answer, separators=(",", ":"))
    return {"prompt": message, "completion": completion}


def make() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the training and the held-out rows; no message and no answer occurs in both."""
    rng = random.Random(SEED)
    seen: set[str] = set()

    def take(count: int, patterns: Sequence[str], names: Sequence[str]) -> list[dict[str, str]]:
        rows = []
        while len(rows) < count:
            row = make_row(rng, patterns, names)
            if row["prompt"].lower() not in seen and row["completion"] not in seen:
                seen.update((row["prompt"].lower(), row["completion"]))
                rows.append(row)
        return rows

    train = take(TRAIN_ROWS, TRAIN_PATTERNS, TRAIN_NAMES)
    return train, take(TEST_ROWS, TEST_PATTERNS, TEST_NAMES)


def main() -> None:
    """Write both files."""
    folder = Path(__file__).parent
    for name, rows in zip(("train", "test"), make(), strict=True):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
