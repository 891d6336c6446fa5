"""Score answers that must be right to the letter.

Invariant: ``exact`` compares strings after stripping the ends; ``same_json`` compares what the two
strings mean (key order and spaces do not count, a number is not its string), so the second is never
below the first for JSON targets. Every answer is written down, one line each, in row order.
Try it: ``mlx-slim demo``, then read ``samples_demo.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import write_text
from mlx_slim.evaluate.generate import Generation


@dataclass(frozen=True)
class ExactMatch:
    """Counts over the scored rows.

    Attributes:
        n: Rows.
        exact: Answers equal to their target, ends stripped.
        same_json: Answers that parse to the target's JSON value.
        samples: One record a row: ``doc_id``, ``generation``, ``stop_reason``, ``target``,
            ``exact_match`` and ``json_match`` (0 or 1).
    """

    n: int
    exact: int
    same_json: int
    samples: list[dict[str, Any]]

    @property
    def rate(self) -> float:
        """Share of exact answers, 0 … 1."""
        return self.exact / self.n if self.n else 0.0


def score(generations: Sequence[Generation], targets: Sequence[str]) -> ExactMatch:
    """Compare each answer with its target.

    Args:
        generations: Answers, in row order.
        targets: The right answers, as many.
    """
    samples: list[dict[str, Any]] = []
    for doc_id, (generation, target) in enumerate(zip(generations, targets, strict=True)):
        samples.append(
            {
                "doc_id": doc_id,
                "generation": generation.text,
                "stop_reason": generation.stop_reason,
                "target": target,
                "exact_match": int(generation.text.strip() == target.strip()),
                "json_match": int(_canonical(generation.text) == _canonical(target) is not None),
            }
        )
    return ExactMatch(
        n=len(samples),
        exact=sum(sample["exact_match"] for sample in samples),
        same_json=sum(sample["json_match"] for sample in samples),
        samples=samples,
    )


def write_samples(path: Path, result: ExactMatch) -> None:
    """Write ``samples_<task>.jsonl``: one record a line, in row order."""
    lines = [json.dumps(sample, ensure_ascii=False) for sample in result.samples]
    write_text(path, "".join(line + "\n" for line in lines))


def _canonical(text: str) -> str | None:
    """Return the JSON value of ``text`` with sorted keys; None if it is no JSON."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return None
