"""Which columns of a row ask and which answer, where they have other names than the formats'.

Invariant: a row is read under other names only where one column asks, one answers and none of the
others holds what the question is about; else the hint is the option that works, or there is none
to propose. Used by ``data/formats.py``; try it:
``mlx-slim data preview smollm2-lora data.path=dolly.jsonl``.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

# Pairs of columns that ask and answer, as data sets name them; the commonest first.
ASK = ("instruction", "question", "prompt", "query", "input")
_ANSWER = ("output", "response", "answer", "completion")
_CONTEXT = ("input", "context")
# Part of the question, which a prompt without it would leave out.
_PASSAGES = {
    *("contexts", "passage", "passages", "document", "documents", "paragraph", "paragraphs"),
    *("article", "story", "evidence", "background", "table", "schema"),
}
_CONTENT = {*_PASSAGES, "choices", "options", "chosen", "rejected", "image", "images"}

# Only proposed, never assumed.
_MORE_ASK = (
    *(*ASK, "problem", "task", "article", "document", "dialogue"),
    *("source", "user", "human", "request"),
)
_MORE_ANSWER = (
    *_ANSWER,
    *("solution", "reply", "target", "assistant", "chosen", "gpt", "bot", "result"),
    *("summary", "highlights", "translation", "label", "final_answer", "ground_truth"),
)
_PLAIN = re.compile(r"[A-Za-z_][\w.-]*")


def recognised(names: Iterable[str]) -> dict[str, str] | None:
    """Return the renames, ours to the row's, that make a row of two known columns Alpaca's.

    A row without a context becomes ``prompt`` and ``completion``. None: the columns do not say it.
    """
    names = list(names)
    answers = [name for name in _ANSWER if name in names]
    asks = [name for name in ASK if name in names]
    if "input" in asks and len(asks) > 1:
        asks.remove("input")  # what an instruction is about
    if len(asks) != 1 or len(answers) != 1 or _CONTENT & set(names):
        return None
    contexts = [name for name in _CONTEXT if name in names and name not in asks]
    if len(contexts) > 1:
        return None
    ask, answer = ("instruction", "output") if contexts else ("prompt", "completion")
    names = {ask: asks[0], answer: answers[0]}
    return names | ({"input": contexts[0]} if contexts else {})


def answers(value: Mapping[str, Any]) -> list[str]:
    """Return the columns of a row that are called like an answer and hold a text, number or flag.

    >>> answers({"text": "Too slow.", "label": 0, "id": 7})
    ['label']
    """
    return [
        name
        for name, item in value.items()
        if name.lower() in _MORE_ANSWER and isinstance(item, str | int | float)
    ]


def proposal(value: Mapping[str, Any], format: str = "auto") -> str:
    """Return what to do with a row whose columns are not known: the option that reads it.

    Args:
        value: The row.
        format: ``auto``, or the format that it should have.
    """
    names = _likely(value, format)
    if names is None:
        ours = (
            "instruction: QUESTION, output"
            if format == "alpaca"
            else "prompt: QUESTION, completion"
        )
        names_ = f"data.columns={{{ours}: ANSWER}}"
        return f"name the columns that ask and answer, the whole question in one: '{names_}'"
    return "name the columns: " + shlex.quote(option(names))


def _likely(value: Mapping[str, Any], format: str) -> dict[str, str] | None:
    """Return the renames that would learn the row's answer; None if no column says so."""
    if format in ("auto", "chat"):
        chats = [name for name, item in value.items() if _is_chat(item)]
        chats = [name for name in chats if name != "rejected"]
        if len(chats) == 1:
            return {"messages": chats[0]}
    texts = [name for name, item in value.items() if isinstance(item, str)]
    if format in ("auto", "text") and len(texts) == 1:
        is_named = format == "auto" and texts[0].lower() in (*_MORE_ASK, *_MORE_ANSWER)
        return None if is_named else {"text": texts[0]}
    if format in ("chat", "text"):
        return None
    answer = _first(_MORE_ANSWER, texts)
    ask = _first(_MORE_ASK, [name for name in texts if name != answer])
    if len(texts) == 2 and None in (ask, answer):
        first, second = texts
        if second == ask or first == answer:
            first, second = second, first
        ask, answer = first, second
    if ask is None or answer is None or answer.lower() in (*_CONTEXT, *ASK):
        return None
    if (_CONTENT - {"chosen", "rejected", ask, answer}) & value.keys():
        return None
    context = next((n for n in _CONTEXT if n in texts and n not in (ask, answer)), None)
    if context is not None:
        return {"instruction": ask, "input": context, "output": answer}
    if format == "alpaca":
        return {"instruction": ask, "output": answer}
    return {"prompt": ask, "completion": answer}


def _is_chat(item: Any) -> bool:
    first = item[0] if isinstance(item, list) and item else None
    return isinstance(first, dict) and (
        {"role", "content"} <= first.keys() or {"from", "value"} <= first.keys()
    )


def option(names: Mapping[str, str]) -> str:
    """Return ``data.columns={…}`` with renames, as YAML reads them."""
    pairs = (
        f"{ours}: {theirs if _PLAIN.fullmatch(theirs) else json.dumps(theirs, ensure_ascii=False)}"
        for ours, theirs in names.items()
    )
    return f"data.columns={{{', '.join(pairs)}}}"


def _first(candidates: Iterable[str], names: list[str]) -> str | None:
    """Return the first known name that a column has, whatever its case, as the column writes it."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in candidates if name in lower), None)
