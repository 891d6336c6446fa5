"""Rows that say which answers are preferred: pairs of answers, or answers with a label.

Invariant: a row of ``prompt, chosen, rejected`` becomes two examples with one prompt, the chosen
answer first; one of ``prompt, completion, label`` becomes one example; anything else is one line
that names the place, the columns seen and those expected. Prompt and answers are texts or lists of
turns; without a prompt, it is what ``chosen`` and ``rejected`` begin with. Answers that repeat the
prompt's turns lose them: no question is read twice, and none is left unread. Of the prompt nothing
is learned. Try it: ``mlx-slim data preview smollm2-dpo``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_slim.config.preference import PreferenceRows
from mlx_slim.data.columns import ASK, option
from mlx_slim.data.conversations import turns_in_json
from mlx_slim.data.formats import Dropped, Example, read_example, renamed_row
from mlx_slim.data.sources import RawRow
from mlx_slim.errors import SlimError
from mlx_slim.reading import shown

SAME_ANSWERS = "chosen and rejected are the same answer"
_PAIR = ("chosen", "rejected")
_ASKS = ("user", "system", "developer")
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
    completion = _behind_prompt(row, value["prompt"], "completion", value["completion"])
    return [(value["prompt"], completion, label)]


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
    whole = isinstance(chosen, list) and chosen[:1] == rejected[:1] and _role(chosen) in _ASKS
    if prompt is None or (isinstance(prompt, str) and whole):
        if prompt is None:
            _check_question(row, value)
        prompt, chosen, rejected = _without_beginning(row, chosen, rejected)
    else:
        chosen = _behind_prompt(row, prompt, "chosen", chosen)
        rejected = _behind_prompt(row, prompt, "rejected", rejected)
    return [(prompt, chosen, None), (prompt, rejected, None)]


def _role(turns: Sequence[Any], number: int = 0) -> str | None:
    """Return the role of a turn, by OpenAI's names; None where it has none."""
    turn = turns[number] if turns else None
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return {"human": "user", "gpt": "assistant"}.get(role, role) if isinstance(role, str) else None


def _plain(turns: Sequence[Any]) -> list[tuple[str | None, Any]]:
    """Return role and text of each turn, whichever of the dialects they are in."""
    texts = (t.get("content", t.get("value")) if isinstance(t, dict) else t for t in turns)
    return [(_role(turns, number), text) for number, text in enumerate(texts)]


def _behind_prompt(row: RawRow, prompt: Any, name: str, answer: Any) -> Any:
    """Return what an answer says behind the prompt, whose turns it may repeat.

    Raises:
        Dropped: If it says nothing else.
        SlimError: If it asks something else.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(answer, list) or not isinstance(turns, list) or _role(answer) not in _ASKS:
        return answer
    if turns and _plain(answer[: len(turns)]) == _plain(turns):
        if len(answer) == len(turns):
            raise Dropped("empty answer")
        return answer[len(turns) :]
    if _role(answer) == "user" and turns and _role(turns, -1) != "user":
        return answer  # the conversation goes on
    raise SlimError(
        f"{row.place}: {name!r} begins with a turn of the {_role(answer)}, "
        f"{shown(_plain(answer)[0][1])}, behind the prompt's",
        "give answers alone, or conversations that begin with the prompt as it is",
    )


def _check_question(row: RawRow, value: Mapping[str, Any]) -> None:
    """Refuse texts without a prompt beside a column that asks and that they do not repeat.

    Raises:
        SlimError: Names the column, and the option that reads it.
    """
    chosen = value["chosen"]
    if not isinstance(chosen, str):
        return
    asking = [
        name
        for name in (*ASK, "messages", "conversations")
        if isinstance(text := value.get(name), list)
        or (isinstance(text, str) and text.strip() and text.strip() not in chosen)
    ]
    if asking:
        hint = f"name the column that asks: {shlex.quote(option({'prompt': asking[0]}))}"
        if len(asking) > 1:
            hint = "give the whole question in one column: prompt, chosen, rejected"
        raise SlimError(f"{row.place}: no 'prompt', and {asking[0]!r} is in neither answer", hint)


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
        role = _role(answer, count) if isinstance(answer, list) else None
        if role in _ASKS:
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
