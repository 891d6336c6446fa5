"""Endpoints that score given texts: equal to a local teacher, tried first, refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.config.distill import DistillConfig, TeacherConfig
from mlx_slim.config.load import Resolved
from mlx_slim.data.batches import collate
from mlx_slim.distillation.run import distill
from mlx_slim.distillation.scoring_endpoint import ScoringEndpoint, filled
from mlx_slim.distillation.target_cache import TargetGenerator, target_layout
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load, load_tokenizer
from tests.distillation.test_run import recipe_with_teachers
from tests.support.endpoint import Script, answers, serving
from tests.support.rows import MemoryRows
from tests.support.runs import Recorder, losses, run_until_killed, write_rows
from tests.support.scoring_server import ScoringServer
from tests.support.tiny import VOCAB, TinyModels, tiny_model

ROWS = MemoryRows([5, 9, 3, 12])
K = 16


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("teacher"), seed=7, num_hidden_layers=2, shards=1)
    file = next(folder.glob("*.safetensors"))
    weights: dict[str, Any] = mx.load(str(file))  # type: ignore[assignment]
    weights["lm_head.weight"] = 8 * weights["lm_head.weight"]  # sharper than a fresh model
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 12)


def endpoint(base_url: str, tokenizer: Path, top_k: int = K, **changes: Any) -> ScoringEndpoint:
    ask = {"timeout": 5.0, "retries": 0, **changes.pop("ask", {})}
    config = DistillConfig.model_validate({"top_k": top_k, "ask": ask, **changes})
    one = TeacherConfig(model="far", base_url=base_url)
    return ScoringEndpoint(one, config, load_tokenizer(tokenizer), VOCAB)


def _dense(targets: Any) -> np.ndarray:
    """Return log-probabilities by id, with the rest's in front (N, 1 + V), NaN where unknown."""
    ids_NK, top_NK, rest_N = targets
    dense = np.full((len(rest_N), 1 + VOCAB), np.nan)
    dense[:, 0] = rest_N
    np.put_along_axis(dense, 1 + ids_NK.astype(np.int64), top_NK, axis=1)
    return dense


@pytest.mark.parametrize("protocol", ["prompt_logprobs", "echo"])
@pytest.mark.parametrize("top_k", [K, VOCAB])
def test_targets_are_those_of_a_local_teacher(teacher: Path, protocol: str, top_k: int) -> None:
    shape = target_layout(ROWS, top_k, VOCAB)
    batch = collate(ROWS, [[row] for row in range(len(ROWS))], isolate=False)
    local = TargetGenerator(load(teacher, dtype=mx.float32).model, shape, 1.0, 1)(batch)
    with serving(ScoringServer(teacher, (protocol,))) as served:
        far = endpoint(served.base_url, teacher, top_k)
        far.check()
        ours = far.targets(batch, shape)
    assert [part.dtype for part in ours] == [part.dtype for part in local]
    ours_dense, expected = _dense(ours), _dense(local)
    np.testing.assert_array_equal(np.isnan(ours_dense), np.isnan(expected))
    np.testing.assert_allclose(ours_dense[:, 1:], expected[:, 1:], atol=2e-5)
    if top_k == K:
        np.testing.assert_allclose(np.exp(ours_dense[:, 0]), np.exp(expected[:, 0]), atol=1e-6)
    assert {request["path"] for request in served.requests} == {"/v1/completions"}
    sent = sorted(len(request["prompt"]) for request in served.requests)
    assert sent[0] == 2  # the trial


def test_a_text_of_several_tokens_is_counted_with_the_rest(teacher: Path) -> None:
    shape = target_layout(ROWS, K, VOCAB)
    batch = collate(ROWS, [[3]], isolate=False)
    local = TargetGenerator(load(teacher, dtype=mx.float32).model, shape, 1.0, 1)(batch)
    with serving(ScoringServer(teacher, ("echo",), token_ids=False)) as served:
        far = endpoint(served.base_url, teacher)
        far.check()
        ids, top, rest = far.targets(batch, shape)
    total = np.exp(top).sum(axis=1) + np.exp(rest)
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert all(len(set(row)) == K for row in ids.tolist())
    expected = _dense(local)
    at_ids = np.take_along_axis(expected, 1 + ids.astype(np.int64), axis=1)
    near = np.abs(at_ids - top) < 2e-5
    assert near.any(axis=1).all()
    assert (near | np.isnan(at_ids) | (top < at_ids)).all()
    assert not near.all()  # half characters are there


def test_places_without_an_id_share_the_rest() -> None:
    ids = np.array([[4, 2, -1, -1], [1, 0, 2, 3]])
    top = np.log([[0.5, 0.2, 1, 1], [0.4, 0.3, 0.2, 0.1]])
    ours_dense, logs, rest = filled(ids, top, np.array([np.log(0.3), -100.0]), 8)
    assert ours_dense.tolist() == [[4, 2, 0, 1], [1, 0, 2, 3]]
    np.testing.assert_allclose(np.exp(logs[0]), [0.5, 0.2, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(np.exp(rest[0]), 0.2, rtol=1e-6)
    assert rest[1] == -100


# ------------------------------------------------------------------------------- before a run


def chat_only(number: int, body: dict[str, Any]) -> Any:
    return (404, b"not ours_dense", {}) if "prompt" in body else answers(number, body)


def without_scores(number: int, body: dict[str, Any]) -> Any:
    return 200, {"choices": [{"text": "x", "logprobs": None}]}, {}


def of_the_answer_only(number: int, body: dict[str, Any]) -> Any:
    """As mlx_lm.server: log-probabilities of what it wrote."""
    logprobs = {"token_logprobs": [-0.1], "top_logprobs": [{"5": -0.1}], "tokens": [5]}
    return 200, {"choices": [{"text": "x", "logprobs": logprobs}]}, {}


@pytest.mark.parametrize("script", [chat_only, without_scores, of_the_answer_only])
def test_what_cannot_score_is_refused_before_anything_starts(
    tiny: TinyModels, data: Path, tmp_path: Path, script: Script
) -> None:
    with serving(script) as served:
        run = _run(tiny("llama"), data, served.base_url)
        with pytest.raises(SlimError, match="does not score a given text") as caught:
            distill(run, tmp_path / "run", observer=Recorder())
    assert "\n" not in caught.value.message
    assert "distill.method=sequence" in caught.value.hint
    assert len(served.requests) == 2  # two tokens, by two protocols
    assert all(len(request["prompt"]) == 2 for request in served.requests)
    assert not (tmp_path / "run").exists()


def _run(model: Path, data: Path, base_url: str, **distillation: Any) -> Resolved:
    teachers = [{"base_url": base_url, "model": "far", **distillation.pop("teacher", {})}]
    settings = {"ask": {"retries": 0, "timeout": 5.0}, "method": "logits", **distillation}
    return recipe_with_teachers(model, data, teachers, **settings)


def test_fewer_log_probabilities_than_requested_are_refused(teacher: Path) -> None:
    def capped(number: int, body: dict[str, Any]) -> Any:
        key = "prompt_logprobs" if "prompt_logprobs" in body else "logprobs"
        return ScoringServer(teacher)(number, {**body, key: 5})

    with serving(capped) as served, pytest.raises(SlimError, match=r"gives [56] of 16") as caught:
        endpoint(served.base_url, teacher).check()
    assert "distill.top_k=" in caught.value.hint
    with (
        serving(ScoringServer(teacher, most=5)) as served,
        pytest.raises(SlimError, match="more than the allowed 5"),
    ):
        endpoint(served.base_url, teacher).check()


@pytest.mark.parametrize("protocol", ["prompt_logprobs", "echo"])
def test_another_tokenizer_is_refused(teacher: Path, tmp_path: Path, protocol: str) -> None:
    other = tiny_model(tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    names = list(vocab)
    for name, number in zip(names, [*list(vocab.values())[7:], *list(vocab.values())[:7]],
                            strict=True):  # fmt: skip
        vocab[name] = number
    (other / "tokenizer.json").write_text(json.dumps(content))
    server = ScoringServer(other, (protocol,), token_ids=False)
    with serving(server) as served, pytest.raises(SlimError, match=r"tokenizer|was sent"):
        endpoint(served.base_url, teacher).check()


def test_the_temperature_and_the_other_methods_are_checked(
    tiny: TinyModels, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SlimError, match="at temperature 1 only"):
        distill(
            _run(tiny("llama"), data, "http://127.0.0.1:1/v1", temperature=2),
            out,
            observer=Recorder(),
        )
    with pytest.raises(SlimError, match="Connection refused"):
        distill(_run(tiny("llama"), data, "http://127.0.0.1:1/v1"), out, observer=Recorder())
    assert not out.exists()


# ---------------------------------------------------------------------------- a hostile server


def _spoiled(choice: dict[str, Any], how: str) -> Any:
    entries = choice["prompt_logprobs"]
    if how == "shorter":
        del entries[-1]
    elif how == "nan":
        next(iter(entries[-1].values()))["logprob"] = float("nan")
    elif how == "positive":
        next(iter(entries[-1].values()))["logprob"] = 2.0
    elif how == "sum":
        for value in entries[-1].values():
            value["logprob"] = -0.1
    elif how == "missing":
        entries[-1] = {}
    elif how == "null":
        choice["prompt_logprobs"] = None
    elif how == "text":
        entries[-1] = "none"
    return {"choices": [choice]}


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("shorter", "positions for"),
        ("nan", "log-prob"),
        ("positive", "a log-probability of 2"),
        ("sum", "probabilities that add up to"),
        ("missing", "no log-probability of token"),
        ("null", "no log-probabilities in the reply"),
        ("text", "no log-probabilities in the reply"),
        ("json", "no log-probabilities in the reply"),
    ],
)
def test_a_hostile_reply_is_one_line(teacher: Path, how: str, line: str) -> None:
    server = ScoringServer(teacher)

    def script(number: int, body: dict[str, Any]) -> Any:
        status, value, headers = server(number, body)
        if number == 0:  # the trial is answered well
            return status, value, headers
        if how == "json":
            return 200, b"<html>\n\nproxy error</html>", {}
        return status, _spoiled(value["choices"][0], how), headers

    shape = target_layout(ROWS, K, VOCAB)
    batch = collate(ROWS, [[0], [1]], isolate=False)
    with serving(script) as served:
        far = endpoint(served.base_url, teacher)
        far.check()
        with pytest.raises(SlimError, match=line) as caught:
            far.targets(batch, shape)
    assert "\n" not in caught.value.message
    assert "far" in caught.value.message
    assert "saved" in caught.value.hint


@pytest.mark.parametrize(
    ("field", "token", "value", "message"),
    [
        ("tokens", 1, "token_id:3", "token 1 is 'token_id:3'"),
        ("top_logprobs", 2, None, "no log-probabilities of token 2"),
    ],
    ids=["other tokens", "a token without log-probabilities"],
)
def test_an_echo_with_a_fault_is_refused(
    teacher: Path, field: str, token: int, value: str | None, message: str
) -> None:
    server = ScoringServer(teacher, ("echo",))

    def script(number: int, body: dict[str, Any]) -> Any:
        status, answer, headers = server(number, body)
        if number > 1 and "echo" in body:
            answer["choices"][0]["logprobs"][field][token] = value
        return status, answer, headers

    with serving(script) as served:
        far = endpoint(served.base_url, teacher)
        far.check()
        with pytest.raises(SlimError, match=message):
            far.targets(collate(ROWS, [[3]], isolate=False), target_layout(ROWS, K, VOCAB))


# ------------------------------------------------------------------------------------ whole runs


def test_a_run_equals_that_of_the_local_teacher(
    tiny: TinyModels, data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, far = tmp_path / "local", tmp_path / "far"
    distill(
        recipe_with_teachers(tiny("llama"), data, [{"model": str(teacher)}], method="logits"),
        local,
        observer=Recorder(),
    )
    monkeypatch.setenv("SCORING_KEY", "sk-very-secret-98765")
    recorder = Recorder()
    with serving(ScoringServer(teacher)) as served:
        run = _run(tiny("llama"), data, served.base_url, teacher={"api_key_env": "SCORING_KEY"})
        distill(run, far, observer=recorder)
    assert losses(far) == pytest.approx(losses(local), rel=1e-4)
    assert all(r["authorization"] == "Bearer sk-very-secret-98765" for r in served.requests)
    text = "".join(str(event) for event in recorder.events)
    files = [f for f in far.rglob("*") if f.is_file() and f.suffix in (".json", ".jsonl", ".html")]
    assert "98765" not in text + "".join(f.read_text(errors="replace") for f in files)
    about = json.loads(next(far.glob("targets/*/about.json")).read_text())
    assert about["teacher"] == {"base_url": served.base_url, "model": "far"}
    assert about["kept"] == 16


KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
from mlx_slim.distillation import target_cache
from mlx_slim.distillation.run import distill
from tests.distillation.test_scoring_endpoint import _run
from tests.support.runs import Recorder

model, data, base_url, out = sys.argv[1:5]
put, calls = target_cache._put, []
def dies(handle, numbers, values):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    put(handle, numbers, values)
target_cache._put = dies
distill(_run(Path(model), Path(data), base_url), Path(out), observer=Recorder())
"""


def test_killed_while_asking_resumes_with_what_is_missing_and_needs_no_server_after(
    tiny: Callable[..., Path], data: Path, teacher: Path, tmp_path: Path
) -> None:
    model, straight, out = tiny("llama"), tmp_path / "straight", tmp_path / "killed"
    with serving(ScoringServer(teacher)) as served:
        distill(_run(model, data, served.base_url), straight, observer=Recorder())
        whole = len(served.requests)
        run_until_killed(KILL_SCRIPT, model, data, served.base_url, out)
        killed = len(served.requests) - whole
        distill(_run(model, data, served.base_url), out, observer=Recorder(), resume=True)
        assert len(served.requests) - whole - killed < whole
        shared = _run(model, data, served.base_url, cache=str(straight / "targets"))
    assert losses(out) == losses(straight)
    distill(shared, tmp_path / "again", observer=Recorder())  # the server is gone
    assert losses(tmp_path / "again") == losses(straight)
