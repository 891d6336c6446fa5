"""``report --verify``: every published number is counted again, and no changed one passes."""

from __future__ import annotations

import copy as copying
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_slim.artifacts import hash_bytes, hash_file, read_json, write_json
from mlx_slim.cli.main import command
from mlx_slim.compare import store
from mlx_slim.compare.recount import Ledger, recount
from mlx_slim.compare.report import build, report
from mlx_slim.compare.verify import count_again, verify, whole
from mlx_slim.errors import SlimError
from tests.support.matrix import write_matrix

CELL = "cells/toy0-lora-s0"
TASKS = {"pubmedqa": 12, "gsm8k": 5, "mmlu": 114}
# Numbers of the files below the report that nothing lower holds; each is compared with its copy in
# results.json, so that it passes only where both are changed alike.
COPIED = {
    "ranks",  # of timings.json, which nothing publishes
    "result.trainable",  # of run.json: what training alone knew
    "result.total",
    "result.predicted_peak_bytes",
    "seed",  # of the cell: what was asked for
    "schema_version",
    "train.predicted_seconds",  # from the speed of the machine at that moment
    "disk.model",  # of a folder that is not the cell's own
    "disk.adapter",
    *(f"intruders.{name}" for name in ("count", "directions", "matrices", "matrices_with", "k")),
    *(f"intruders.{name}" for name in ("energy", "relative_norm", "effective_rank", "epsilon")),
}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "toy"
    write_matrix(folder, methods=("base", "lora"), questions=TASKS)
    report(folder)
    return folder


@pytest.fixture
def copy(matrix: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(matrix, tmp_path / "copy"))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every number in JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


def changed(value: Any, path: tuple[Any, ...]) -> Any:
    """Return JSON with the number at ``path`` a little larger."""
    value = copying.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    number = place[path[-1]]
    place[path[-1]] = number + 1 if isinstance(number, int) else number * (1 + 1e-7) + 1e-8
    return value


def problems_below(folder: Path) -> list[str]:
    """Return what is wrong below the published report."""
    stored = store.load(folder)
    ledger = Ledger()
    recount(stored, ledger)
    lost = [f"{name}: {why}" for name, why in stored.failed if why != stored.record.refused[0][1]]
    return ledger.problems + lost


def rehash(out: Path, task: str) -> None:
    """Make the hashes of an evaluation fit its samples, as a careful forger would."""
    samples, progress = out / f"samples_{task}.jsonl", out / "progress.jsonl"
    entry = json.loads(progress.read_text())
    size = samples.stat().st_size
    entry |= {"sha256": hash_bytes(samples.read_bytes()), "end": size}
    progress.write_text(json.dumps(entry) + "\n")
    results = read_json(out / "results.json")
    section = results.get(task) or results["tasks"][task]
    section["samples_sha256"] = hash_file(samples)
    write_json(out / "results.json", results)


def test_everything_is_counted_again(matrix: Path) -> None:
    verified = verify(matrix)
    assert verified.cells == 2 and verified.questions == 2 * 131 and verified.numbers > 3_000
    done = CliRunner().invoke(command, ["report", str(matrix), "--verify"])
    assert "all agree" in done.output


def test_no_number_of_the_report_can_be_changed(matrix: Path) -> None:
    claimed = read_json(matrix / "results.json")
    again = json.loads(json.dumps(build(store.load(matrix)).as_json()))
    paths = list(leaves(claimed))
    assert len(paths) > 200
    for path in paths:
        ledger = Ledger()
        ledger.compare("results.json", changed(claimed, path), again)
        assert len(ledger.problems) == 1, path


@pytest.mark.parametrize(
    "name",
    [
        "cell.json",
        "eval/pubmedqa/results.json",
        "eval/gsm8k/results.json",
        "eval/mmlu/results.json",
        "eval/held_out/results.json",
        "eval/held_out/timings.json",
        "run/run.json",
    ],
)
def test_no_number_below_it_can_be_changed(copy: Path, name: str) -> None:
    file = copy / CELL / name
    content = read_json(file)
    every = list(leaves(content))
    if name == "eval/mmlu/results.json":  # 57 parts alike
        every = [path for path in every if "subtasks" not in path or "anatomy" in path]
    passed = set()
    for path in every:
        write_json(file, changed(content, path))
        if not problems_below(copy):
            passed.add(".".join(map(str, path)))
    assert passed <= COPIED
    write_json(file, content)
    assert not problems_below(copy)


@pytest.mark.parametrize("task", ["pubmedqa", "gsm8k", "perplexity"])
def test_no_number_of_a_sample_can_be_changed(copy: Path, task: str) -> None:
    out = copy / CELL / "eval" / ("held_out" if task == "perplexity" else task)
    samples = out / f"samples_{task}.jsonl"
    lines = samples.read_text().splitlines()
    for index in (0, len(lines) - 1):
        record = json.loads(lines[index])
        for path in leaves(record):
            told = [*lines]
            told[index] = json.dumps(changed(record, path))
            samples.write_text("".join(line + "\n" for line in told))
            assert problems_below(copy), path


def test_forged_hashes_do_not_hide_what_contradicts_itself(copy: Path) -> None:
    """``acc`` against its log-likelihoods, a mark against its text, an answer against the key."""

    def forged(task: str, change: dict[str, Any]) -> list[str]:
        out = copy / CELL / "eval" / task
        samples = out / f"samples_{task}.jsonl"
        before = samples.read_text()
        record = json.loads(before.splitlines()[0])
        samples.write_text(before.replace(json.dumps(record), json.dumps({**record, **change}), 1))
        rehash(out, task)
        problems = problems_below(copy)
        samples.write_text(before)
        rehash(out, task)
        return problems

    record = json.loads((copy / CELL / "eval/pubmedqa/samples_pubmedqa.jsonl").open().readline())
    place = "toy0-lora-s0 pubmedqa, question 0.acc"
    assert any(place in line for line in forged("pubmedqa", {"acc": 1 - record["acc"]}))
    other = (record["target"] + 1) % 3
    assert any(".target" in line for line in forged("pubmedqa", {"target": other}))
    assert forged("pubmedqa", {"loglikelihoods": [-1.0, -5.0, -0.5]})
    assert any(".strict" in line for line in forged("gsm8k", {"generation": "#### 4321"}))
    assert forged("gsm8k", {"strict": "77", "strict_match": 1, "target": "77"})
    assert not problems_below(copy)


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("eval/held_out/results.json", ("perplexity", "metrics", "bits_per_byte", "value")),
        ("eval/pubmedqa/results.json", ("tasks", "pubmedqa", "metrics", "macro_f1", "value")),
        ("eval/pubmedqa/results.json", ("tasks", "pubmedqa", "metrics", "macro_f1", "stderr")),
        ("eval/mmlu/results.json", ("tasks", "mmlu", "macro", "acc", "stderr")),
        ("cell.json", ("bits_per_byte",)),
        ("run/run.json", ("result", "done", "tokens")),
    ],
)
def test_a_report_after_the_change_does_not_hide_it(copy: Path, file: str, path: Any) -> None:
    target = copy / CELL / file
    write_json(target, changed(read_json(target), path))
    write_json(copy / "results.json", build(store.load(copy)).as_json())
    assert count_again(store.load(copy))[0].problems


def test_pages_sweeps_questions_and_missing_files(copy: Path) -> None:
    def problems() -> list[str]:
        return count_again(store.load(copy))[0].problems

    page = copy / "report.md"
    text = page.read_text()
    page.write_text(text.replace("100", "101", 1))
    assert not problems()
    with pytest.raises(SlimError, match="1 numbers do not match the stored answers") as caught:
        verify(copy)
    assert caught.value.details == ["report.md differs from what the stored answers give"]
    page.write_text(text)
    sweep = copy / "sweeps/toy0-lora/sweep.json"
    record = read_json(sweep)
    write_json(sweep, {**record, "chosen": 2e-3})
    assert any("sweep toy0-lora chosen" in line for line in problems())
    write_json(sweep, record)
    questions = copy / "questions/pubmedqa.jsonl"
    lines = questions.read_text()
    questions.write_text(lines.replace('"target": 0', '"target": 1', 1))
    assert any("was changed: its hash" in line for line in problems())
    questions.write_text(lines)
    (copy / CELL / "eval/gsm8k/progress.jsonl").unlink()
    assert any("progress.jsonl" in line for line in problems())
    (copy / "questions/tasks.json").unlink()
    assert any("tasks.json does not exist" in line for line in problems())


def test_a_removed_cell_is_reported(copy: Path) -> None:
    """Before the report is made again its numbers are missed; afterwards the cell itself is."""
    shutil.rmtree(copy / CELL)
    with pytest.raises(SlimError, match="numbers do not match the stored answers") as caught:
        verify(copy)
    assert any("rows: 2 published, 1 found" in line for line in caught.value.details)
    report(copy)
    done = CliRunner().invoke(command, ["report", str(copy), "--verify"])
    assert "warning: toy0-lora-s0 is missing: not run" in done.output
    assert "of 1 of 3 cells recomputed" in done.output  # one was refused from the start

    # Its name removed from the list too: the matrix itself still asks for it.
    record = read_json(copy / "matrix.json")
    models = {"toy0": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct"}}
    methods = {"base": {"kind": "base"}, "lora": {"recipe": {"method": "lora"}}}
    methods |= {"huge": {"recipe": {"method": "full"}}}
    spec = {"title": "toy", "models": models, "methods": methods, "tasks": [{"task": "gsm8k"}]}
    record |= {"matrix": {**spec, "seeds": [0]}, "cells": ["toy0-base", "toy0-lora-s0"]}
    write_json(copy / "matrix.json", record)
    assert problems_below(copy) == ["toy0-lora-s0: not run"]
    write_json(copy / "matrix.json", {**record, "cells": ["toy0-base"]})
    assert problems_below(copy) == [
        "matrix.json.cells: toy0-lora-s0 is missing, though it is part of the matrix"
    ]


def test_score_times_n_is_whole() -> None:
    assert not whole("x", 94 / 200, 94, 200)
    assert whole("x", 0.4725, 94, 200)
    assert whole("x", 0.47, 93, 200)
