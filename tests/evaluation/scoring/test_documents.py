"""Perplexity tasks: windows and blocks, the figures, what is compared and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.artifacts import hash_file, read_records
from mlx_slim.cli.main import run
from mlx_slim.compare.matrix_spec import TaskEntry
from mlx_slim.compare.questions import _of_task
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.comparison import compare
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.evaluation.scoring.documents import DocumentsJob
from mlx_slim.evaluation.scoring.requests import RequestEncoder
from mlx_slim.evaluation.tasks.prompts import build_questions
from mlx_slim.evaluation.tasks.rows import TaskRows, load_rows
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.evaluation.tasks.training_rows import training_rows
from mlx_slim.models.load import load, load_tokenizer
from mlx_slim.slimming.options import SlimOptions
from mlx_slim.slimming.questions import plan_questions
from tests.evaluation.support import write_rows
from tests.support.tiny import tiny_model

Tiny = Callable[..., Path]
PAGE = (
    ' = Number {0} = \n The {0} @-@ year @,@ old " dog " ( a pet ) said : it \'s 1 @.@ 5 ° C ; N '
    "[ sic ] ! \n = = Later = = \n It slept , and woke . "
)
ROWS = [{"page": PAGE.format(number) * (1 + number % 3)} for number in range(6)]
BLOCK = "kind: perplexity\ndata: {path: rows.jsonl}\nprompt: '{{ page }}'\nblock: 64\n"


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    write_rows(tmp_path / "mirror" / "wikitext" / "test.jsonl", ROWS)
    return tmp_path / "mirror"


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "blocks.yaml").write_text(BLOCK)
    return tmp_path / "blocks.yaml"


def logprobs(folder: Path, ids: list[int]) -> np.ndarray:
    """Return log p(ids[i + 1] | ids[: i + 1]) by one plain pass, float64."""
    model = load(folder, dtype=mx.float32).model
    logits = np.array(model(mx.array([ids]))[0]).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits[np.arange(len(ids) - 1), ids[1:]]


def test_a_page_is_detokenized_and_its_raw_words_and_bytes_count(mirror: Path) -> None:
    task = find_task("wikitext")
    questions = build_questions(task, load_rows(task, mirror))
    assert questions[0].context == (
        ' = Number 0 =\nThe 0-year,old "dog" (a pet) said: it\'s 1.5°C; 1 [sic]!\n== Later ==\n'
        "It slept, and woke. "
    )
    for question, row in zip(questions, ROWS, strict=True):
        words, size = len(re.split(r"\s+", row["page"])), len(row["page"].encode())
        assert question.lengths == (words, size)


def test_documents_are_predicted_whole(tiny: Tiny, mirror: Path, tmp_path: Path) -> None:
    folder, out = tiny("llama"), tmp_path / "out"
    options = EvalOptions(data_dir=mirror, dtype="float32", max_length=512)
    evaluate(folder, "wikitext", out, options)
    section = json.loads((out / "results.json").read_text())["tasks"]["wikitext"]
    records = list(read_records(out / "samples_wikitext.jsonl"))
    assert section["n"] == len(records) == len(ROWS) and section["window"] == 512
    task = find_task("wikitext")
    encoder = RequestEncoder(load_tokenizer(folder), 512)
    for question, record in zip(
        build_questions(task, load_rows(task, mirror)), records, strict=True
    ):
        ids = [encoder.prefix(), *encoder.document(question.context)]
        assert record["tokens"] == len(ids) - 1
        assert record["loglikelihood"] == pytest.approx(logprobs(folder, ids).sum(), abs=2e-3)
        assert (record["words"], record["bytes"]) == question.lengths
    nats = -sum(record["loglikelihood"] for record in records)
    words, size = (sum(record[key] for record in records) for key in ("words", "bytes"))
    metrics = {name: one["value"] for name, one in section["metrics"].items()}
    assert metrics["word_perplexity"] == pytest.approx(math.exp(min(nats / words, 700)))
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(nats / size))
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)


def test_blocks_are_whole_and_their_first_token_is_not_predicted(
    tiny: Tiny, blocks: Path, tmp_path: Path
) -> None:
    folder, out = tiny("llama"), tmp_path / "out"
    evaluate(folder, str(blocks), out, EvalOptions(dtype="float32"))
    encoder = RequestEncoder(load_tokenizer(folder), 512)
    ids = encoder.document("\n\n".join(row["page"] for row in ROWS))
    count = len(ids) // 64
    assert len(ids) % 64  # the rest is dropped
    records = list(read_records(out / "samples_blocks.jsonl"))
    assert [record["tokens"] for record in records] == [63] * count
    expected = [logprobs(folder, list(ids[64 * i : 64 * i + 64])).sum() for i in range(count)]
    assert [record["loglikelihood"] for record in records] == pytest.approx(expected, abs=1e-3)
    section = json.loads((out / "results.json").read_text())["tasks"]["blocks"]
    assert section["metrics"]["perplexity"]["value"] == pytest.approx(
        math.exp(-sum(expected) / count / 63), rel=1e-5
    )
    assert section["metrics"]["bits_per_token"]["value"] == pytest.approx(
        -sum(expected) / count / 63 / math.log(2), rel=1e-5
    )


def test_two_models_are_compared_text_by_text(
    tiny: Tiny, mirror: Path, blocks: Path, tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "other", "llama", seed=3)
    options = EvalOptions(data_dir=mirror, dtype="float32")
    names = f"wikitext,{blocks}"
    for name, folder in (("a", tiny("llama")), ("b", other)):
        evaluate(folder, names, tmp_path / name, options)
    rows = {row.metric: row for row in compare(tmp_path / "a", tmp_path / "b").rows}
    assert {row.unit for row in rows.values()} == {"bits/byte", "bits/token"}
    sides = [json.loads((tmp_path / x / "results.json").read_text())["tasks"] for x in "ab"]
    for task, metric in (("wikitext", "bits_per_byte"), ("blocks", "bits_per_token")):
        first, second = (side[task]["metrics"][metric]["value"] for side in sides)
        paired = rows[metric].paired
        assert (paired.first, paired.second) == (pytest.approx(first), pytest.approx(second))
        assert rows[metric].verdict and rows[metric].chance is None
    assert rows["bits_per_byte"].paired.n == len(ROWS)


def test_blocks_of_other_tokens_do_not_compare(tiny: Tiny, blocks: Path, tmp_path: Path) -> None:
    for name in "ab":
        evaluate(tiny("llama"), str(blocks), tmp_path / name, EvalOptions(limit=3))
    samples = tmp_path / "b" / "samples_blocks.jsonl"
    results = tmp_path / "b" / "results.json"
    old = samples.read_text()
    samples.write_text(old.replace('"ids_sha256": "', '"ids_sha256": "x', 1))
    record = json.loads(results.read_text())
    record["tasks"]["blocks"]["samples_sha256"] = hash_file(samples)
    results.write_text(json.dumps(record))
    with pytest.raises(SlimError, match="other tokens: bits per token do not compare"):
        compare(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-fewshot", "2"], "no few-shot examples"),
        (["--apply-chat-template"], "predicts a text as it is, without --apply-chat-template"),
        (["--max-length", "32"], "blocks of 64 tokens, the model reads 32"),
        (["--limit", "0"], "limit"),
    ],
)
def test_what_has_no_place_in_a_text_is_refused(
    tiny: Tiny,
    blocks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert run(["eval", str(tiny("llama")), "--task", str(blocks), "-o", str(out), *words]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_short_and_empty_texts_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"page": "short"}])
    (tmp_path / "blocks.yaml").write_text(BLOCK)
    task = find_task(tmp_path / "blocks.yaml")
    encoder = RequestEncoder(load_tokenizer(tiny("llama")), 512)
    with pytest.raises(SlimError, match="fewer than a block of 64"):
        DocumentsJob(task, "", None, build_questions(task, load_rows(task)), encoder)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    for limit, words in ((3, "blocks of 64 tokens"), (None, "windows of at most 512 tokens")):
        one = task if limit else find_task("wikitext")
        questions = build_questions(one, TaskRows(ROWS, [], "", ""), 0, limit)
        note = DocumentsJob(one, "", limit, questions, encoder).cut_note()
        assert note.startswith(f"{one.name}: ") and note.endswith(words)
    (tmp_path / "texts.yaml").write_text(BLOCK.replace("block: 64\n", ""))
    task = find_task(tmp_path / "texts.yaml")
    with pytest.raises(SlimError, match="the prompt is empty"):
        build_questions(task, TaskRows([{"page": " \n"}], [], "", ""))


def test_a_text_has_no_answers_to_train_on_or_to_count(blocks: Path) -> None:
    task = find_task(blocks)
    with pytest.raises(SlimError, match="no questions to learn the answers of"):
        training_rows(task, load_rows(task), 0, None)
    for name in ("wikitext", "truthfulqa_mc2"):
        with pytest.raises(SlimError, match="counts no right answers"):
            _of_task(find_task(name), TaskEntry(task=name))
    with pytest.raises(SlimError, match="counts no right answers, so no share of them"):
        plan_questions(SlimOptions(tasks=(str(blocks),)))


def test_its_first_text_is_shown(
    mirror: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["tasks", "wikitext", "--data-dir", str(mirror)]) == 0
    shown: Any = capsys.readouterr().out
    assert "all of it is predicted" in shown and "right answer" not in shown
