"""Evaluations: scores as the plain scorer gives them, and folders that survive a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim import locks
from mlx_slim.adapters.inject import inject
from mlx_slim.adapters.store import save_adapter
from mlx_slim.claims import LOCK_FILE
from mlx_slim.config.schema import AdapterConfig, QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.evaluation import jobs
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.evaluation.scoring import perplexity
from mlx_slim.evaluation.scoring.plain import plain_generate, plain_score
from mlx_slim.evaluation.scoring.requests import max_length
from mlx_slim.events import EvalDone, EvalProgress, EvalStarted, Notice, TaskDone
from mlx_slim.models.load import load
from mlx_slim.models.save import save_model
from mlx_slim.quantization.apply import quantize_model
from tests.adapters.support import shake
from tests.support.evals import (
    CHUNK,
    differences,
    result_files,
    samples_of,
    score_in_process,
    write_tasks,
)
from tests.support.runs import Recorder
from tests.support.tiny import tiny_model

Tiny = Callable[..., Path]
Files = tuple[Path, Path, Path]  # two tasks and a text


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "CHOICE_CHUNK", CHUNK)
    monkeypatch.setattr(jobs, "GENERATION_CHUNK", CHUNK)
    monkeypatch.setattr(perplexity, "WINDOWS", 2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tasks: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "CHOICE_CHUNK", CHUNK)
        patch.setattr(jobs, "GENERATION_CHUNK", CHUNK)
        patch.setattr(perplexity, "WINDOWS", 2)
        _score(tiny("llama"), tasks, out)
    return out


def _score(model: Path, tasks: Files, out: Path, **words: Any):
    names = [str(task) for task in tasks[:2]]
    resume, observer = words.pop("resume", False), words.pop("observer", None)
    options = EvalOptions(perplexity=tasks[2], **words)
    return evaluate(model, names, out, options, resume=resume, observer=observer)[0]


# ------------------------------------------------------------------------------------- numbers


def test_the_results_are_those_of_the_plain_scorer(tiny: Tiny, tasks: Files, whole: Path) -> None:
    loaded = load(tiny("llama"))
    samples = samples_of(whole, "toy_choice")
    assert differences(whole, loaded, tasks) == []
    results = json.loads((whole / "results.json").read_text())
    section = results["tasks"]["toy_choice"]
    assert (section["n"], section["num_fewshot"], section["task_version"]) == (24, 0, 1)
    assert section["metrics"]["acc"]["k"] == sum(sample["acc"] for sample in samples)
    assert set(section["subtasks"]) == {"one", "two"}
    assert "macro" in section
    assert "micro" in section
    assert section["tokens_computed"] >= section["tokens_minimum"] > 0
    for sample in samples_of(whole, "toy_answer")[::9]:
        row = json.loads(
            (tasks[0].parent / "rows.jsonl").read_text().splitlines()[sample["doc_id"]]
        )
        ids = loaded.tokenizer.encode(f"Say {row['question']}:")
        text, reason = plain_generate(loaded.model, loaded.tokenizer, ids, 12, ("\n", "a"))
        assert (sample["generation"], sample["stop_reason"]) == (text, reason)


def test_perplexity_is_that_of_one_long_forward_pass(
    tiny: Tiny, tasks: Files, tmp_path: Path
) -> None:
    import math

    text = tmp_path / "short.txt"
    text.write_text("Grün ist die Wiese, und die Kühe grasen.")
    evaluate(tiny("llama"), [], tmp_path / "out", EvalOptions(perplexity=text))
    perplexity = json.loads((tmp_path / "out" / "results.json").read_text())["perplexity"]
    loaded = load(tiny("llama"))
    ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer.encode(text.read_text())]
    value, _ = plain_score(loaded.model, ids, 1)
    size = len(text.read_bytes())
    assert (perplexity["bytes"], perplexity["tokens"]) == (size, len(ids) - 1)
    assert perplexity["metrics"]["bits_per_byte"]["value"] == pytest.approx(
        -value / math.log(2) / size, rel=1e-5
    )
    assert perplexity["metrics"]["bits_per_token"]["value"] == pytest.approx(
        -value / math.log(2) / (len(ids) - 1), rel=1e-5
    )


@pytest.fixture
def adapter(tiny: Tiny, tmp_path: Path) -> Path:
    loaded = load(tiny("llama"))
    config = AdapterConfig()
    injected = inject(loaded.model, config, dora=False)
    shake(loaded.model)
    folder = tmp_path / "adapters"
    save_adapter(folder, loaded.model, config, injected, dora=False, base="tiny")
    return folder


def test_an_adapter_changes_the_scores_and_is_recorded(
    tiny: Tiny, tasks: Files, adapter: Any, whole: Path, tmp_path: Path
) -> None:
    from mlx_slim.adapters.store import load_adapter

    _score(tiny("llama"), tasks, tmp_path / "out", adapter=adapter)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["adapter"] == str(adapter)
    assert results["adapter_sha256"]
    loaded = load(tiny("llama"))
    load_adapter(loaded.model, adapter)
    assert differences(tmp_path / "out", loaded, tasks) == []
    assert (
        result_files(tmp_path / "out")["samples_toy_choice.jsonl"]
        != (result_files(whole)["samples_toy_choice.jsonl"])
    )


@pytest.mark.parametrize("dense", [True, False])
def test_a_quantized_base(
    tiny: Tiny, tasks: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: bool
) -> None:
    monkeypatch.setattr("mlx_slim.models.quantized.DENSE_FRACTION", 0.5 if dense else 0.0)
    loaded = load(tiny("llama"))
    report = quantize_model(loaded.model, loaded.config, QuantizeConfig(bits=4, group_size=32))
    folder = tmp_path / "q4"
    save_model(folder, loaded.model, loaded.tokenizer, report.config)
    result = _score(folder, tasks, tmp_path / "out")
    again = load(folder, dtype=mx.float32)
    assert result["dense"] == (dense and mx.default_device().type == mx.DeviceType.cpu)
    assert differences(tmp_path / "out", again, tasks) == []


@pytest.mark.parametrize("architecture", ["phi", "mistral"])
def test_other_architectures(tiny: Tiny, tasks: Files, tmp_path: Path, architecture: str) -> None:
    _score(tiny(architecture), tasks, tmp_path / "out")
    loaded = load(tiny(architecture))
    assert differences(tmp_path / "out", loaded, tasks) == []


def test_the_rows_that_examples_come_from_are_recorded(
    tiny: Tiny, tasks: Files, whole: Path, tmp_path: Path
) -> None:
    options = EvalOptions(num_fewshot=1, limit=2)
    (result,) = evaluate(tiny("llama"), [str(tasks[0])], tmp_path / "out", options)
    assert len(result["tasks"]["toy_choice"]["shots_sha256"]) == 64
    without = json.loads((whole / "results.json").read_text())
    assert without["tasks"]["toy_choice"]["shots_sha256"] is None


def test_a_tokenizer_that_adds_bos(tasks: Files, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "bos", bos=True)
    _score(model, tasks, tmp_path / "out")
    loaded = load(model)
    assert differences(tmp_path / "out", loaded, tasks) == []


def test_truncated_requests_are_counted(tiny: Tiny, tasks: Files, tmp_path: Path) -> None:
    result = _score(tiny("llama"), tasks, tmp_path / "out", max_length=48)
    assert result["tasks"]["toy_choice"]["truncated"] > 0
    assert result["max_length"] == 48
    assert max_length(load(tiny("llama")).config, load(tiny("llama")).tokenizer) == 512


def test_the_chat_template_is_off_by_default_and_recorded(
    tiny: Tiny, tasks: Files, whole: Path, tmp_path: Path
) -> None:
    assert json.loads((whole / "results.json").read_text())["chat_template"] is False
    result = _score(tiny("llama"), tasks, tmp_path / "out", apply_chat_template=True)
    assert result["chat_template"] is True
    assert result["tasks"]["toy_choice"]["chat_template"] is True
    assert (
        result_files(tmp_path / "out")["samples_toy_choice.jsonl"]
        != (result_files(whole)["samples_toy_choice.jsonl"])
    )
    bare = tiny_model(tmp_path / "bare", chat_template=None)
    with pytest.raises(SlimError, match="no chat template"):
        _score(bare, tasks, tmp_path / "other", apply_chat_template=True)
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------- folders


def test_killed_twice_and_resumed_the_files_are_the_same(
    tiny: Tiny, tasks: Files, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_one = (tiny("llama"), list(tasks[:2]), tasks[2], out)
    score_in_process(*run_one, moment="samples", count=2)
    torn = (out / "samples_toy_choice.jsonl").read_bytes()
    assert not torn.endswith(b"\n")
    score_in_process(*run_one, moment="progress", count=3, resume=True)
    assert not (out / "progress.jsonl").read_bytes().endswith(b"\n")
    assert not (out / "results.json").exists()
    recorder = Recorder()
    _score(tiny("llama"), tasks, out, resume=True, observer=recorder)
    assert result_files(out) == result_files(whole)
    (started,) = [event for event in recorder.events if isinstance(event, EvalStarted)]
    assert started.answered > 0


def test_two_ranks_write_what_one_writes(
    tiny: Tiny, tasks: Files, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    score_in_process(tiny("llama"), list(tasks[:2]), tasks[2], out, ranks=2)
    assert result_files(out) == result_files(whole)
    assert json.loads((out / "timings.json").read_text())["ranks"] == 2


def test_a_damaged_chunk_is_computed_again(
    tiny: Tiny, tasks: Files, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "results.json").unlink()
    samples = out / "samples_toy_answer.jsonl"
    samples.write_bytes(samples.read_bytes().replace(b'"doc_id": 20', b'"doc_id": 21'))
    _score(tiny("llama"), tasks, out, resume=True)
    assert result_files(out) == result_files(whole)


def test_a_finished_folder_is_left_alone(tiny: Tiny, tasks: Files, whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    recorder = Recorder()
    result = _score(tiny("llama"), tasks, whole, resume=True, observer=recorder)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    assert result == json.loads((whole / "results.json").read_text())
    last = recorder.events[-1]
    assert isinstance(last, Notice) and "nothing to do" in last.message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"limit": 3}, "tasks.toy_choice.limit: None → 3"),
        ({"num_fewshot": 1}, "num_fewshot: 0 → 1"),
        ({"batch_tokens": 64}, "batch_tokens: None → 64"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' → 'bfloat16'"),
        ({"apply_chat_template": True}, "chat_template: False → True"),
        (
            {"apply_chat_template": True, "system": "Be brief."},
            "system_instruction: None → 'Be brief.'",
        ),
        ({"seed": 3}, "seed: 0 → 3"),
    ],
)
def test_a_resume_with_other_values_is_refused(
    tiny: Tiny, tasks: Files, whole: Path, tmp_path: Path, change: Any, text: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "results.json").unlink()
    if "num_fewshot" in change:
        change = {**change, "perplexity": None}
        with pytest.raises(SlimError, match="started with other settings") as caught:
            evaluate(tiny("llama"), [str(tasks[0])], out, EvalOptions(num_fewshot=1), resume=True)
    else:
        with pytest.raises(SlimError, match="started with other settings") as caught:
            _score(tiny("llama"), tasks, out, resume=True, **change)
    assert text in caught.value.message


def test_other_weights_are_refused_on_resume(tiny: Tiny, tasks: Files, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    out = tmp_path / "out"
    _score(model, tasks, out)
    (out / "results.json").unlink()
    shutil.rmtree(model)
    tiny_model(model, seed=5)
    with pytest.raises(SlimError, match="weights_sha256"):
        _score(model, tasks, out, resume=True)


def test_a_folder_with_results_needs_resume_and_a_new_one_needs_none(
    tiny: Tiny, tasks: Files, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(SlimError, match="holds results already"):
        _score(tiny("llama"), tasks, whole)
    recorder = Recorder()
    _score(tiny("llama"), tasks, tmp_path / "new", resume=True, observer=recorder)
    first = recorder.events[0]
    assert isinstance(first, Notice) and "holds no results to resume: starting" in first.message
    assert result_files(tmp_path / "new") == result_files(whole)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("keep")
    for resume in (True, False):
        with pytest.raises(SlimError, match="not empty and holds no results"):
            _score(tiny("llama"), tasks, tmp_path / "other", resume=resume)


def test_what_a_kill_left_of_the_first_file_is_in_nobodys_way(
    tiny: Tiny, tasks: Files, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".eval.json.mlx-slim-0123abcd.json").write_text("{")
    (out / LOCK_FILE).touch()
    _score(tiny("llama"), tasks, out)
    assert result_files(out) == result_files(whole)
    assert not list(out.glob(".*"))


def test_two_processes_do_not_write_one_folder(
    tiny: Tiny, tasks: Files, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "results.json").unlink()
    lock = locks.acquire(out / LOCK_FILE)
    assert lock is not None
    with pytest.raises(SlimError, match="another process is writing"):
        _score(tiny("llama"), tasks, out, resume=True)
    lock.release()


# ------------------------------------------------------------------------------------- several


def test_several_models_get_a_folder_each(
    tiny: Tiny, tasks: Files, whole: Path, tmp_path: Path
) -> None:
    models = [tiny("llama"), tiny("mistral")]
    out = tmp_path / "out"
    options = EvalOptions(perplexity=tasks[2])
    names = [str(task) for task in tasks[:2]]
    results = evaluate(models, names, out, options)
    assert [result["model"] for result in results] == [str(model) for model in models]
    assert result_files(out / "llama") == result_files(whole)
    summary = json.loads((out / "summary.json").read_text())["models"]
    assert list(summary) == ["llama", "mistral"]
    assert summary["llama"]["toy_choice"] == results[0]["tasks"]["toy_choice"]["metrics"]
    (out / "mistral" / "results.json").unlink()
    again = evaluate(models, names, out, options, resume=True)
    assert [sorted(result) for result in again] == [sorted(result) for result in results]
    with pytest.raises(SlimError, match="holds results already"):
        evaluate(models, names, out, options)
    with pytest.raises(SlimError, match="the results of one model"):
        evaluate(models, names, whole, options, resume=True)


# -------------------------------------------------------------------------------------- events


def test_what_an_observer_hears(tiny: Tiny, tasks: Files, tmp_path: Path) -> None:
    recorder = Recorder()
    _score(tiny("llama"), tasks, tmp_path / "out", observer=recorder)
    heard = [event for event in recorder.events if event.name != "notice"]
    assert isinstance(heard[0], EvalStarted)
    assert isinstance(heard[-1], EvalDone)
    assert heard[0].tasks == ("toy_choice", "toy_answer", "perplexity")
    progress = [event for event in heard if isinstance(event, EvalProgress)]
    metrics = {event.task: event.metric for event in progress}
    assert metrics == {
        "toy_choice": "acc_norm",
        "toy_answer": "exact_match",
        "perplexity": "bits_per_token",
    }
    fractions = [event.fraction for event in progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)
    assert len({event.task for event in progress}) == 3
    done = [event for event in heard if isinstance(event, TaskDone)]
    assert [event.task for event in done] == ["toy_choice", "toy_answer", "perplexity"]
