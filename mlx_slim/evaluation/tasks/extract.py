"""Answers extracted from generated text, and compared as lm-evaluation-harness compares them.

Invariant: a filter gives the first or the last match of its pattern, of that match the first
non-empty group, stripped; a text without a match gives ``NO_ANSWER``, which is never right. What
``ignore`` names is removed from both sides, in order, before they are compared. Try it:
``mlx-slim eval MODEL --task gsm8k --limit 10 -o out``.
"""

from __future__ import annotations

import json

from mlx_slim.config.patterns import compile_pattern
from mlx_slim.config.task import Filter, TaskSpec

NO_ANSWER = "[invalid]"


def extract(answer_filter: Filter, text: str) -> str:
    """Return the answer that ``answer_filter`` reads out of ``text``, or ``NO_ANSWER``."""
    matches = compile_pattern(answer_filter.pattern).matches(text)
    if not matches:
        return NO_ANSWER
    match = matches[0 if answer_filter.take == "first" else -1]
    groups = match.groups() or (match[0],)
    answer = next((group for group in groups if group), "")
    return answer.strip() or NO_ANSWER


def normalize(spec: TaskSpec, text: str) -> str:
    """Return ``text`` as it is compared: without what the task ignores, ends stripped."""
    for pattern in spec.ignore:
        text = compile_pattern(pattern).replace(text, "")
    text = text.strip()
    return text.lower() if spec.ignore_case else text


def same_json(text: str, target: str) -> bool:
    """Return whether both are JSON of the same value (``1`` is not ``"1"``)."""
    return _canonical(text) == _canonical(target) is not None


def _canonical(text: str) -> str | None:
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return None
