"""Scoring speed and memory side by side: our engine against mlx-lm's scorer, or the harness.

Invariant: both sides answer the same questions with the same shots and the same limit of new
tokens, each in a fresh process; time begins with the texts, model loaded, and ends with the last
answer; the answers are compared. Try it:
``mlx-slim bench eval MODEL --task hellaswag --limit 100 --against mlx-lm --json``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mlx_slim.bench.eval_sides import EvalWork
from mlx_slim.bench.options import BenchEvalOptions
from mlx_slim.bench.rounds import record, run_side
from mlx_slim.bench.torch_sides import check_installed
from mlx_slim.reading import JsonObject


def bench_eval(
    model: str, options: BenchEvalOptions, progress: Callable[[str], None]
) -> JsonObject:
    """Measure our scorer against a peer's on the first questions of a task.

    Args:
        model: Hub id or folder.
        options: Which questions, and how often.
        progress: Called with a line before each run.

    Returns:
        The record that DESIGN.md calls ``bench … --json``. ``ratio.speed`` is that of questions
        per second; ``agreement`` compares the answers of the two sides.

    Raises:
        SlimError: If lm-eval is not installed, or a side fails.
    """
    against = options.against
    other = against.replace("-", "_")
    check_installed(against)
    work = EvalWork(
        model=model,
        task=options.task,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        data_dir=None if options.data_dir is None else str(options.data_dir),
        dtype=options.dtype,
    )
    results: list[JsonObject] = []
    answers: dict[str, list[Any]] = {}
    for number in range(options.rounds):
        sides: dict[str, JsonObject] = {}
        for name, side in (("ours", "ours"), (other, against)):
            progress(f"round {number + 1}/{options.rounds}: {side}")
            module = "torch_sides" if side == "lm-eval" else "eval_sides"
            sides[name] = run_side(module, side, asdict(work))
            answers[name] = sides[name].pop("answers")
            minimum = sides["ours"]["tokens_minimum"]  # the same work for both
            sides[name]["tokens_per_second"] = minimum / sides[name]["seconds"]
            progress(f"  {sides[name]['questions_per_second']:.3f} questions/s")
        results.append(sides)
    result = record({**asdict(work), "against": against}, other, results)
    result["ratio"]["computed_to_minimum"] = (
        result["ours"]["tokens_computed"] / result["ours"]["tokens_minimum"]
    )
    result["agreement"] = agreement(answers["ours"], answers[other])
    return result


def agreement(ours: list[Any], theirs: list[Any]) -> JsonObject:
    """Compare the answers of two sides: texts, or log-likelihoods of each question's choices."""
    if isinstance(ours[0], str):
        same = sum(one == other for one, other in zip(ours, theirs, strict=True))
        return {"questions": len(ours), "same_text": same}
    same = sum(
        one.index(max(one)) == other.index(max(other))
        for one, other in zip(ours, theirs, strict=True)
    )
    largest = max(
        abs(a - b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    return {"questions": len(ours), "same_prediction": same, "largest_difference_nats": largest}
