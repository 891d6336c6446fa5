"""Rows that say which answers are preferred: pairs of answers, or answers with a label.

Invariant: a row of ``prompt, chosen, rejected`` becomes two examples with one prompt, the chosen
answer first; one of ``prompt, completion, label`` becomes one example; anything else is one line
that names the place, the columns seen and those expected. Prompt and answers are texts or lists of
turns; without a prompt, it is what ``chosen`` and ``rejected`` begin with. Of the prompt nothing is
learned. Try it: ``mlx-slim data preview smollm2-dpo``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_slim.config.preference import PreferenceRows
from mlx_slim.data.conversations import turns_in_json
from mlx_slim.data.formats import Dropped, Example, read_example, renamed_row
from mlx_slim.data.sources import RawRow
from mlx_slim.errors import SlimError
from mlx_slim.reading import shown

SAME_ANSWERS = "chosen and rejected are the same answer"
_PAIR = ("chosen", "rejected")
_EXPECTED = {
    "pairs": "prompt, chosen, rejected",
    "labels": "prompt, completion, label",
}
_WEIGHTED = "turns with a weight of their own (a comparison weighs whole answers)"


def read_answers(
    row: RawRow, kind: PreferenceRows, *, columns: Mapping[str, str], system: str | None
) -> list[Example]:
    """Return the examples of a row: chosen and rejected, or the one answer with its label.

    Args:
        row: The raw row.
        kind: ``pairs`` or ``labels``.
        columns: Renames, ours to the file's.
        system: System message where the row has none.

    Raises:
        Dropped: If an answer is empty, or both are the same.
        SlimError: If columns are missing or hold the wrong type.
    """
    renamed = renamed_row(row, columns)
    answers_of = _PAIR if kind == "pairs" else ("completion",)
    if {*answers_of} <= renamed.keys() and None in (renamed[name] for name in answers_of):
        raise Dropped("empty answer")  # a null, as in plain rows
    value = {k: v for k, v in renamed.items() if v is not None or k == "label"}
    value |= {k: t for k in ("prompt", "completion", *_PAIR) if (t := turns_in_json(value.get(k)))}
    answers = _pair(row, value) if kind == "pairs" else _labelled(row, value)
    rest = {k: v for k, v in value.items() if k in ("system", "system_prompt", "tools")}
    examples = []
    for prompt, answer, label in answers:
        texts = row._replace(value={**rest, "prompt": prompt, "completion": answer})
        example = read_example(texts, "completions", columns={}, system=system)
        weights = [float(weight > 0) for weight in example.turn_weights]
        notes = example.notes
        if example.weights is not None and weights != example.weights:
            notes = (*notes, _WEIGHTED)
        examples.append(replace(example, weights=weights, notes=notes, label=label))
    if len(examples) == 2 and examples[0].messages == examples[1].messages:
        raise Dropped(SAME_ANSWERS)
    return examples


def _labelled(row: RawRow, value: Mapping[str, Any]) -> list[tuple[Any, Any, bool | None]]:
    if not {"prompt", "completion", "label"} <= value.keys():
        raise _wrong_columns(row, value, "labels")
    label = value["label"]
    if not isinstance(label, bool):
        raise SlimError(
            f"{row.place}: 'label' is {shown(label)}, expected true (a wanted answer) or false"
        )
    return [(value["prompt"], value["completion"], label)]


def _pair(row: RawRow, value: Mapping[str, Any]) -> list[tuple[Any, Any, bool | None]]:
    if not set(_PAIR) <= value.keys():
        raise _wrong_columns(row, value, "pairs")
    chosen, rejected = value["chosen"], value["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        kinds = " and ".join(type(one).__name__ for one in (chosen, rejected))
        raise SlimError(
            f"{row.place}: 'chosen' and 'rejected' are {kinds}, expected two texts or two lists of "
            "turns"
        )
    if chosen == rejected:
        raise Dropped(SAME_ANSWERS)
    prompt = value.get("prompt")
    # As TRL: a prompt that is a text beside whole conversations repeats their first turn.
    whole = isinstance(chosen, list) and chosen[:1] == rejected[:1]
    if prompt is None or (isinstance(prompt, str) and whole):
        prompt, chosen, rejected = _without_beginning(row, chosen, rejected)
    return [(prompt, chosen, None), (prompt, rejected, None)]


def _without_beginning(row: RawRow, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Return what both begin with, and the rest of each.

    Raises:
        SlimError: If that is nothing, or turns of the user differ.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    count = next((i for i, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    if isinstance(chosen, str):  # whole words of both
        count = max(chosen.rfind(" ", 0, count), chosen.rfind("\n", 0, count)) + 1
    hint = "give the prompt in a column of its own: prompt, chosen, rejected"
    if not count:
        raise SlimError(
            f"{row.place}: no 'prompt', and 'chosen' and 'rejected' begin with nothing in common",
            hint,
        )
    for answer in (chosen, rejected):
        if count == len(answer):
            raise Dropped("empty answer")
        first = answer[count]
        role = first.get("role", first.get("from")) if isinstance(first, dict) else None
        if role in ("user", "human", "system"):
            raise SlimError(
                f"{row.place}: 'chosen' and 'rejected' differ from turn {count + 1} on, a turn of "
                f"the {role}: they answer different prompts",
                hint,
            )
    return chosen[:count], chosen[count:], rejected[count:]


def _wrong_columns(row: RawRow, value: Mapping[str, Any], kind: PreferenceRows) -> SlimError:
    seen = ", ".join(k for k, v in row.value.items() if v is not None) or "none"
    hint = "to learn the answers of plain rows, drop the section: preference=null"
    if kind == "pairs" and "label" in value:
        hint = "answers with labels are for preference.loss=kto"
    elif kind == "labels" and set(_PAIR) <= value.keys():
        hint = "pairs are for another preference.loss, such as sigmoid (DPO)"
    return SlimError(
        f"{row.place}: columns seen: {seen}; expected: {_EXPECTED[kind]} (preference)", hint
    )
