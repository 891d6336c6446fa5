"""The path of a GPU through every command, rehearsed on a CPU: bfloat16, compiled, one thread.

One tiny architecture, one set of rows: the kernels that one test compiles serve the others.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slim import runtime
from mlx_slim.adapters.stack import load_adapters, parse_adapters
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.data.shapes import SHAPES
from mlx_slim.distillation.run import distill
from mlx_slim.errors import Interrupted
from mlx_slim.evaluation.chat import open_session
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.evaluation.scoring.generate import generate_batch
from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.plain import log_softmax, plain_logits, plain_score
from mlx_slim.evaluation.scoring.requests import Request
from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.export.model import export_gguf, export_hf
from mlx_slim.export.ollama import export_ollama
from mlx_slim.export.peft import export_peft, import_peft
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import load
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.pruning.recover import RecoverOptions, prune_and_recover
from mlx_slim.quantization.run import CompressOptions, compress
from mlx_slim.training import step
from tests.support.evals import write_tasks
from tests.support.gpu import gpu_path
from tests.support.runs import CtrlC, Recorder, losses, recipe, write_rows
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="mx.compile needs a C++ compiler on a CPU"
)
LAYERS = 2
DISTILL = {"top_k": 16, "weight": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"method": "full"},
    "qlora": {"method": "qlora"},
    "dora": {"method": "dora"},
    "qat": {"quantize": {"bits": 4, "group_size": 32, "qat": True}},
    "adalora": {
        "adapter": {
            "rank": 6,
            "adaptive": {"target_rank": 3, "warmup": 1, "final": 1, "interval": 1},
        }
    },
    "saved": {
        "method": "qlora",
        "adapter": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
        "train": {"neftune_alpha": 5, "layer_decay": 0.9},
    },
    "distillation": {"distill": DISTILL},
    "mutual": {"distill": {"method": "mutual", **DISTILL}},
}
# Log-likelihoods in bfloat16, nats a token: both sides round every layer of the model, each in its
# own order. 8 bits, 2 layers, logits of size 1: measured below 0.01.
NATS = 0.03


@dataclass(frozen=True)
class Files:
    """What all tests work on."""

    model: Path
    teacher: Path
    rows: Path
    text: Path
    folder: Path


@pytest.fixture(scope="module", autouse=True)
def on_gpu() -> Iterator[None]:
    with gpu_path():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("gpu")
    shape = {"num_hidden_layers": LAYERS, "dtype": mx.bfloat16}
    text = folder / "notes.txt"
    text.write_text("\n".join(f"{i}: a line of plain words to look at" for i in range(60)))
    return Files(
        tiny_model(folder / "model", **shape),
        tiny_model(folder / "teacher", seed=1, **shape),
        write_rows(folder / "rows.jsonl"),
        text,
        folder,
    )


def _resolved(files: Files, name: str) -> Resolved:
    small = recipe(files.model, files.rows, steps=3, save_every=1, validate_every=3)
    values = small.recipe.model_dump(exclude_unset=True)
    for key, value in METHODS[name].items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    if "distill" in values:
        values["distill"]["teachers"] = [{"model": str(files.teacher)}]
    return from_values(values, name, "test")


def _train(files: Files, name: str, out: Path, stop: bool = False, resume: bool = False) -> None:
    resolved = _resolved(files, name)
    run = finetune if resolved.recipe.distill is None else distill
    run(resolved, out, observer=CtrlC(1) if stop else Recorder(), resume=resume)


@pytest.fixture(scope="module")
def trained(files: Files) -> Callable[[str], Path]:
    """Return a function: method -> a run of three steps that nothing interrupted."""

    def get(name: str) -> Path:
        out = files.folder / f"run-{name}"
        if not out.exists():
            _train(files, name, out)
        return out

    return get


def _tensors(run: Path) -> dict[str, bytes]:
    """Return all that a run saved: weights, optimizer, callbacks."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*.safetensors"))
        if "targets" not in path.parts
    }


def test_the_path_is_that_of_a_gpu() -> None:
    assert runtime.resolve_dtype("auto") == mx.bfloat16
    assert runtime.default_num_threads() == 1


@pytest.mark.parametrize("name", METHODS)
def test_three_steps_and_an_exact_resume(
    files: Files,
    trained: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    shapes: set[tuple] = set()
    compiled = mx.compile

    def counting(function: Callable, **words: Any) -> Callable:
        def call(parameters: Any, *arrays: Any) -> Any:
            shapes.add((function, *(None if a is None else (*a.shape, a.dtype) for a in arrays)))
            return fused(parameters, *arrays)

        fused = compiled(function, **words)
        return call

    straight, stopped = trained(name), tmp_path / "stopped"
    with pytest.raises(Interrupted, match="after step 1 of 3"):
        _train(files, name, stopped, stop=True)
    monkeypatch.setattr(step.mx, "compile", counting)
    _train(files, name, stopped, resume=True)
    assert list(losses(stopped)) == [1, 2, 3]
    assert losses(stopped) == losses(straight)
    ours, theirs = _tensors(stopped), _tensors(straight)
    assert len(ours) >= 3 and ours.keys() == theirs.keys()
    assert [key for key in ours if ours[key] != theirs[key]] == []
    assert json.loads((straight / "run.json").read_text())["dtype"] == "bfloat16"
    assert 2 <= len(shapes) <= SHAPES  # steps, and validation


@pytest.fixture(scope="module", params=["dense", "quantized"])
def scored(request: pytest.FixtureRequest, files: Files) -> Path:
    """A model to score: dense, and in 4 bits, made by the command."""
    if request.param == "dense":
        return files.model
    out = files.folder / "q4"
    settings = QuantizeConfig(group_size=32)
    options = CompressOptions(settings, calibration=str(files.text), length=32, fidelity_samples=2)
    result = compress(files.model, out, options)
    assert result.fidelity is not None and 0 < result.fidelity.kl < 0.1
    return out


def test_scores_are_those_of_the_plain_scorer(scored: Path) -> None:
    model = load(scored, dtype=mx.bfloat16).model
    layers = {type(module) for module in model.modules() if "scales" in module}
    assert layers == ({nn.QuantizedLinear, nn.QuantizedEmbedding} if layers else set())
    draw = np.random.default_rng(3)
    requests = []
    for number in range(6):  # short and long contexts, choices of one and of several tokens
        context = tuple(draw.integers(3, 200, 5 + 9 * number).tolist())
        for length in (1, 1 + number, 9):
            ids = context + tuple(draw.integers(3, 200, length).tolist())
            requests.append(Request(ids, len(context)))
    wide = load(scored, dtype=mx.float32).model
    for batch_tokens in (40, None):
        scores = LoglikelihoodScorer(model, batch_tokens=batch_tokens).score(requests)
        for score, request in zip(scores, requests, strict=True):
            tolerance = NATS * (len(request.ids) - request.start)
            for other in (model, wide):
                expected, _ = plain_score(other, request.ids, request.start)
                assert abs(score.loglikelihood - expected) < tolerance, (request, other is wide)


def test_an_evaluation_and_a_chat_answer_as_the_plain_forward_pass(
    files: Files, scored: Path, tmp_path: Path
) -> None:
    choice, answers, text = write_tasks(tmp_path / "tasks", 6)
    text.write_text(text.read_text()[:200])
    evaluate(scored, [str(choice), str(answers)], tmp_path / "out", EvalOptions(perplexity=text))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["dtype"] == "bfloat16" and results["dense"] is False
    loaded = load(scored, dtype=mx.bfloat16)
    ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer.encode(text.read_text())]
    nats = -plain_score(loaded.model, ids, 1)[0] / (len(ids) - 1)
    bits = results["perplexity"]["metrics"]["bits_per_token"]["value"]
    assert abs(bits * math.log(2) - nats) < NATS
    prompts = [ids[:12], ids[:40], ids[20:70]]
    generations = [each.ids for each in generate_batch(loaded.model, loaded.tokenizer, prompts, 6)]
    session = open_session(scored)
    pieces = list(session.stream(prompts[0], max_tokens=6, temperature=0.0))
    assert pieces and session.last is not None
    for prompt, generated in zip(
        [*prompts, prompts[0]], [*generations, session._cached_ids[12:]], strict=True
    ):
        logp_TV = log_softmax(plain_logits(loaded.model, prompt + generated))
        for position, token in enumerate(generated, len(prompt) - 1):
            # Logits that are near or equal in bfloat16 may win in either computation.
            assert logp_TV[position, token] > logp_TV[position].max() - 2 * NATS


def test_pruned_and_recovered(files: Files, tmp_path: Path) -> None:
    choice, _, _ = write_tasks(tmp_path / "tasks", 6)
    train = json.dumps(_resolved(files, "lora").recipe.train.model_dump(exclude_unset=True))
    file = tmp_path / "recover.yaml"
    file.write_text(
        f"{{model: replaced, method: lora, adapter: {{dropout: 0.1}}, report_answers: 0, "
        f"data: {{path: {files.rows}, validation: 4}}, train: {train}}}"
    )
    options = PruneOptions(
        ratio=0.5, samples=4, length=32, held_out=128, calibration=str(files.text)
    )
    after = RecoverOptions(str(file), (), (str(choice),), limit=3)
    report = prune_and_recover(files.model, tmp_path / "out", options, after, Recorder())
    assert [row.name for row in report.rows] == ["original", "pruned", "recovered"]
    assert report.rows[1].parameters < report.rows[0].parameters
    assert all(row.text is not None and np.isfinite(row.text.kl) for row in report.rows)


@pytest.mark.parametrize("method", ["awq", "gptq", "dwq", "dynamic", "blockwise"])
def test_quantized_with_calibration(files: Files, tmp_path: Path, method: str) -> None:
    settings = QuantizeConfig(group_size=32)
    options = CompressOptions(
        settings, method=method, calibration=str(files.text), length=32, samples=4
    )
    result = compress(files.model, tmp_path / "out", options)
    assert result.fidelity is not None and 0 < result.fidelity.kl < 0.1


@pytest.mark.parametrize(("name", "mode"), [("lora", "merge"), ("qlora", "dequantize")])
def test_fused_exported_and_read_again(
    files: Files, trained: Callable[[str], Path], tmp_path: Path, name: str, mode: Any
) -> None:
    run = trained(name)
    base = files.model if name == "lora" else run / "base"
    tuned = load(base, dtype=mx.bfloat16)
    load_adapters(tuned.model, parse_adapters(run))
    tokens_BT = mx.arange(24)[None]
    expected = tuned.model(tokens_BT).astype(mx.float32)
    options = FuseOptions(mode=mode, calibration=str(files.text), length=32, force=True)
    fused = fuse(base, run, tmp_path / "fused", options)
    export_hf(fused.path, tmp_path / "hf")
    export_gguf(fused.path, tmp_path / "gguf", kind="q8_0", calibration=str(files.text))
    export_ollama(fused.path, tmp_path / "ollama", calibration=str(files.text))
    export_peft(run, tmp_path / "peft", base=str(base))
    import_peft(tmp_path / "peft", tmp_path / "back", base=str(base))
    again = load(base, dtype=mx.bfloat16)
    load_adapters(again.model, parse_adapters(tmp_path / "back"))
    for model in (
        *(load(tmp_path / each, dtype=mx.bfloat16).model for each in ("fused", "hf")),
        again.model,
    ):
        gap = mx.abs(model(tokens_BT).astype(mx.float32) - expected).max()
        assert runtime.to_float(gap) < NATS * runtime.to_float(mx.abs(expected).max())
