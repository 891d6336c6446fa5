"""Pairs of answers whose difference a program can check: dates with the day first are preferred.

    python examples/date_pairs.py FOLDER

writes ``train.jsonl`` (64 pairs), ``validation.jsonl`` (200 pairs about other things, in other
sentences) and the same as labelled answers for KTO (``train-labels.jsonl``). The files are the
same on every run. In the public domain (CC0).
"""

import json
import random
import re
import sys
from calendar import month_name
from pathlib import Path

MONTHS = list(month_name)[1:]
DAY_FIRST = re.compile(rf"\b\d{{1,2}} ({'|'.join(MONTHS)}) \d{{4}}\b")
TRAIN = (
    ["bridge", "library", "school", "museum", "market", "station", "harbour", "theatre"],
    [
        ("When did the {thing} open?", "The {thing} opened on {date}."),
        ("When is the {thing} closing?", "It closes on {date}."),
        ("Since when is there a {thing}?", "There is a {thing} since {date}."),
        ("Tell me the date of the {thing} fire.", "The fire was on {date}."),
    ],
)
VALIDATION = (
    ["tower", "garden", "airport", "hospital", "bakery", "stadium", "mill", "lighthouse", "zoo"],
    [
        ("On which day was the {thing} built?", "The {thing} was built on {date}."),
        ("When will they paint the {thing}?", "They will paint it on {date}."),
        ("What is the date of the {thing} party?", "The party at the {thing} is on {date}."),
        ("When did we last visit the {thing}?", "We last visited the {thing} on {date}."),
    ],
)


def pairs(
    count: int, things: list[str], sentences: list[tuple[str, str]], seed: int
) -> list[dict[str, str]]:
    """Return ``count`` different pairs; the prompt has the date in digits."""
    draw, rows, seen = random.Random(seed), [], set()
    while len(rows) < count:
        thing, (question, answer) = draw.choice(things), draw.choice(sentences)
        year, month, day = draw.randint(1950, 2029), draw.randint(1, 12), draw.randint(1, 28)
        prompt = f"{question.format(thing=thing)} ({year}-{month:02}-{day:02})"
        if prompt in seen:
            continue
        seen.add(prompt)
        name = MONTHS[month - 1]
        texts = [
            answer.format(thing=thing, date=written)
            for written in (f"{day} {name} {year}", f"{name} {day}, {year}")
        ]
        rows.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
    return rows


def labels(rows: list[dict[str, str]]) -> list[dict[str, str | bool]]:
    """Return the chosen answer of every other pair as wanted, the rejected ones as not."""
    return [
        {
            "prompt": row["prompt"],
            "completion": row["rejected" if number % 2 else "chosen"],
            "label": number % 2 == 0,
        }
        for number, row in enumerate(rows)
    ]


def write(folder: Path) -> None:
    """Write the files; check every pair with the pattern first."""
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = pairs(64, *TRAIN, seed=0), pairs(200, *VALIDATION, seed=1)
    for row in train + validation:
        assert DAY_FIRST.search(row["chosen"])
        assert not DAY_FIRST.search(row["rejected"])
    files = {"train": train, "validation": validation, "train-labels": labels(train)}
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
