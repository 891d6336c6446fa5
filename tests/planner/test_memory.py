"""The planner against published counts, against the real allocator, and against itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlx_slim.adapters.inject import inject
from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batch
from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.activations import use_fast_swiglu
from mlx_slim.models.quantized import use_fast_matmul
from mlx_slim.planner import peak
from mlx_slim.planner.memory import predict
from mlx_slim.planner.shapes import leaves, training_shapes
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from mlx_slim.planner.work import Speed, TrainingWork, expected_work
from mlx_slim.quantization.apply import quantize_model
from mlx_slim.training.grad_checkpoint import checkpointed
from mlx_slim.training.optim import Optimizer
from mlx_slim.training.step import CrossEntropy, Stepper
from tests.support.tiny import ARCHITECTURES

# model: parameters, LoRA r8 on q and v, LoRA r8 on all linears, 4-bit bytes / 1e9
PUBLISHED = {
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": (
        *(1_100_048_384, 1_126_400, 6_307_840, 0.619),
    ),
    "microsoft/phi-2": (2_779_683_840, 2_621_440, 11_796_480, 1.565),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, 3_407_872, 20_971_520, 4.074),
    "meta-llama/Llama-2-7b-hf": (6_738_415_616, 4_194_304, 19_988_480, 3.791),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (134_515_008, 460_800, 2_442_240, 0.076),
}


def recipe(method: str = "lora", **sections: Any) -> Recipe:
    return Recipe(model="x", method=method, **sections)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("model", PUBLISHED)
def test_counts_are_the_published_ones(model: str) -> None:
    parameters, q_and_v, all_linear, four_bit = PUBLISHED[model]
    config = SHIPPED_CONFIGS[model]
    prediction = training_shapes(config, recipe("qlora"), mx.bfloat16)
    assert prediction.parameters == parameters
    assert prediction.trainable_parameters == all_linear
    assert prediction.base_bytes / 1e9 == pytest.approx(four_bit, abs=5e-4)
    targets = {"targets": ["q_proj", "v_proj"]}
    prediction = training_shapes(config, recipe(adapter=targets), mx.bfloat16)
    assert prediction.trainable_parameters == q_and_v
    assert prediction.base_bytes == 2 * parameters


def build(config: dict[str, Any], plan: Recipe) -> Any:
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    if plan.method == "qlora":
        quantize_model(model, config, plan.quantize)
    use_fast_matmul(model)  # as ``load`` does
    use_fast_swiglu(model)
    if plan.method != "full":
        inject(model, plan.adapter, dora=plan.method == "dora")
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_static_bytes_are_exact(architecture: str, method: str, optimizer: str) -> None:
    config = ARCHITECTURES[architecture]
    plan = recipe(method, train={"optimizer": optimizer})
    model = build(config, plan)
    real = Optimizer(model, plan.train)
    prediction = training_shapes(config, plan, mx.float32)
    arrays = dict(tree_flatten(model.parameters()))
    cached = [v for k, v in arrays.items() if "_base_norm2" in k]
    assert prediction.base_bytes + prediction.adapter_bytes == sum(
        v.nbytes for v in arrays.values()
    ) + (0 if cached or method != "dora" else sum(m._base_norm2_O.nbytes for m in _doras(model)))
    assert prediction.optimizer_bytes == sum(value.nbytes for value in real.state().values())
    assert prediction.trainable == {
        path: value.shape
        for path, value in dict(tree_flatten(model.trainable_parameters())).items()
    }


def _doras(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "_base_norm2_O")]


def config_of(**changes: Any) -> dict[str, Any]:
    base = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 768,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 1024,
    }
    return {**ARCHITECTURES["llama"], **base, **changes}


@pytest.mark.parametrize(
    ("plan", "batch"),
    [
        (recipe(train={"batch_tokens": 512, "max_length": 128}), (4, 128)),
        (recipe(train={"batch_tokens": 512, "max_length": 256}), (2, 256)),
        (
            recipe(train={"batch_tokens": 512, "max_length": 128, "grad_checkpoint": True}),
            (4, 128),
        ),
        (recipe("qlora", train={"batch_tokens": 512, "max_length": 128}), (4, 128)),
        (recipe("dora", train={"batch_tokens": 512, "max_length": 128}), (4, 128)),
        (recipe("full", train={"batch_tokens": 512, "max_length": 128}), (4, 128)),
    ],
    ids=["lora", "lora-long", "lora-checkpointed", "qlora", "dora", "full"],
)
def test_prediction_is_near_the_measured_peak(
    plan: Recipe, batch: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_peaks_agree(config_of(), plan, batch, monkeypatch, rel=0.15)


_HEADS = {
    "capped": {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 32,
    },
    "scaled": {
        "model_type": "granite",
        "logits_scaling": 8.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "whole": {},
}


@pytest.mark.parametrize("head", list(_HEADS))
def test_heads_with_a_finish_are_planned_as_they_are_computed(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of logits under a soft cap or a scale; all of them where nothing splits."""
    if head == "whole":
        monkeypatch.setattr(structure, "_candidates", lambda model: [])
    plan = recipe(train={"batch_tokens": 512, "max_length": 128, "loss_chunk": 64})
    config = config_of(vocab_size=32768, num_hidden_layers=2, **_HEADS[head])
    assert_peaks_agree(config, plan, (4, 128), monkeypatch, rel=0.25)


def assert_peaks_agree(
    config: dict[str, Any],
    plan: Recipe,
    batch: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    rel: float,
) -> None:
    if mx.default_device().type == mx.DeviceType.gpu:
        pytest.skip("checked against the unfused CPU kernels")
    monkeypatch.setattr(
        peak, "default_num_threads", lambda: 1
    )  # threads meet by chance: bench plan has them
    vocabulary = config["vocab_size"]
    model = build(config, plan)
    optimizer = Optimizer(model, plan.train)
    rng = np.random.default_rng(0)
    count = batch[0] * batch[1]
    positions = np.sort(rng.permutation(count)[: count * 2 // 3]).astype(np.int32)
    rows = Batch(
        rng.integers(0, vocabulary, batch).astype(np.int32),
        positions,
        rng.integers(0, vocabulary, len(positions)).astype(np.int32),
        np.arange(len(positions)),
        None,
        count,
        batch[0],
    )
    stepper = Stepper(model, CrossEntropy(model, plan.train.loss_chunk))
    with checkpointed(structure.blocks(model), plan.train.grad_checkpoint):
        mx.eval(optimizer.arrays())
        mx.clear_cache()
        weights = sum(v.nbytes for _, v in leaves(model))
        before = mx.get_active_memory()  # other tests' models may still be alive
        mx.reset_peak_memory()
        stepper.micro(rows)
        measured = mx.get_peak_memory() - before
    prediction = predict(config, plan, gpu=False, budget=1, suggest=False)
    parts = prediction.breakdown
    moving = parts["activations"] + parts["logits"] + parts["gradients"]
    assert weights <= parts["weights"]
    assert moving == pytest.approx(measured, rel=rel)


def test_every_knob_turns_the_right_way() -> None:
    config = SHIPPED_CONFIGS["TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"]

    def bytes_of(method: str = "lora", gpu: bool = True, **train: Any) -> int:
        plan = recipe(method, train=train)
        return predict(config, plan, gpu=gpu, budget=1, suggest=False).predicted_peak_bytes

    base = bytes_of()
    static = bytes_of(batch_tokens=512) - (bytes_of(batch_tokens=1024) - bytes_of(batch_tokens=512))
    assert bytes_of(batch_tokens=2048) - static == pytest.approx((base - static) / 2, rel=0.05)
    assert bytes_of(grad_checkpoint=True) < 0.5 * base
    assert bytes_of(max_length=256) < base
    assert bytes_of("qlora") < base < bytes_of("dora") < bytes_of("full")
    assert (
        bytes_of("full", optimizer="adafactor")
        < bytes_of("full", optimizer="sgd")
        < bytes_of("full")
    )
    assert bytes_of(gpu=False) > base  # float32 where a GPU has bfloat16


def test_counted_lengths_replace_the_longest_allowed() -> None:
    plan = recipe(train={"batching": "grouped"})
    short = predict(config_of(), plan, lengths=[64] * 1000, gpu=False, budget=1)
    few = predict(config_of(), plan, lengths=[64] * 4, gpu=False, budget=1)
    blind = predict(config_of(), plan, gpu=False, budget=1)
    assert few.predicted_peak_bytes < short.predicted_peak_bytes < blind.predicted_peak_bytes
    assert short.tokens == 3 * 64 * 1000


def test_time_needs_a_speed_and_rows(tmp_path: Path) -> None:
    config = config_of()
    speed = Speed(flops=1e11, exponential=3e-8, element=3e-10)
    plan = recipe(data={"path": "nobody/nothing"})
    assert predict(config, plan, gpu=False, budget=1, speed=speed).predicted_seconds is None
    steps = recipe(data={"path": "nobody/nothing"}, train={"steps": 10})
    seconds = predict(config, steps, gpu=False, budget=1, speed=speed).predicted_seconds
    again = recipe(data={"path": "nobody/nothing"}, train={"steps": 20, "grad_checkpoint": True})
    longer = predict(config, again, gpu=False, budget=1, speed=speed).predicted_seconds
    assert seconds is not None and longer is not None
    assert 2 * seconds < longer < 4 * seconds
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a b c d", "completion": "e f g h"}\n' * 50)
    work = expected_work(recipe(data={"path": str(rows), "validation": 4}), None)
    assert work is not None
    assert "46 rows" in work.basis


def test_a_quantized_config_counts_as_quantized() -> None:
    config = config_of()
    packed = {**config, "quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}
    fresh = training_shapes(config, recipe("qlora"), mx.float32)
    stored = training_shapes(packed, recipe("qlora"), mx.float32)
    assert stored.base_bytes == fresh.base_bytes
    assert stored.parameters == fresh.parameters
    with pytest.raises(SlimError, match="quantized"):
        training_shapes(packed, recipe("full"), mx.float32)


@pytest.mark.parametrize(
    "config",
    [{"model_type": "nonsense"}, {"model_type": "llama"}, config_of(num_attention_heads=0)],
)
def test_a_config_that_fits_no_model_is_one_clear_line(config: dict[str, Any]) -> None:
    with pytest.raises(SlimError, match="no model can be built"):
        training_shapes(config, recipe(), mx.float32)


def test_planning_leaves_the_random_numbers_alone() -> None:
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    training_shapes(config_of(), recipe(), mx.float32)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_tokens_are_guessed_from_the_rows_that_will_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the rows are too long, the columns that nobody reads are longer still."""
    monkeypatch.setenv("MLX_SLIM_DATA", str(tmp_path))
    rows = [
        {"prompt": "p" * 43, "completion": "c" * (43 if i % 2 else 4300), "text": "t" * 9000}
        for i in range(400)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    as_array = tmp_path / "rows.json"
    as_array.write_text(json.dumps(rows, indent=1))

    def tokens(path: Path = file, distill: dict[str, Any] | None = None, **data: Any) -> int:
        values = {"path": str(path), "template": "plain", "validation": 0, **data}
        with_teacher: dict[str, Any] = {"distill": distill} if distill else {}
        train = {"max_length": 256, "epochs": 1}
        work = expected_work(recipe(data=values, train=train, **with_teacher))
        assert work is not None
        return work.tokens

    assert tokens() == tokens(as_array) == 200 * 21
    assert tokens(validation=50) == 150 * 21
    assert tokens(validation=0.5) == tokens(max_rows=200) == 100 * 21
    assert tokens(template="auto") == 200 * 60
    assert tokens(truncation="right") == 200 * (21 + 256)
    two = {"teachers": [{"model": "a"}, {"model": "b"}], "ask": {"max_tokens": 100}}
    assert tokens(distill={**two, "method": "logits"}) == 200 * 21
    assert tokens(distill={**two, "method": "sequence"}) == 200 * 3 * 21
    assert tokens(distill={**two, "method": "sequence", "weight": 1}) == 200 * 2 * 21
    assert tokens(distill={**two, "method": "rationales"}) == 200 * (21 + 2 * 121)
    part = expected_work(
        recipe(
            data={
                "path": [{"path": str(file), "skip": 100, "limit": 100}],
                "template": "plain",
                "validation": 0,
            },
            train={"max_length": 256, "epochs": 2},
        )
    )
    assert part is not None and part.tokens == 2 * 50 * 21


def test_only_what_is_learned_is_counted_as_supervised(tmp_path: Path) -> None:
    """The last of three answers, rows without one left out, and what a turn's weight says."""

    def chat(*answers: dict[str, Any]) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        for keys in answers:
            turns += [{"role": "user", "content": "u" * 430}]
            turns += [{"role": "assistant", "content": "a" * 430, **keys}]
        return {"messages": turns}

    file = tmp_path / "rows.jsonl"

    def work(*rows: dict[str, Any], **data: Any) -> TrainingWork:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"path": str(file), "template": "plain", "validation": 0, **data}
        prediction = expected_work(recipe(data=values, train={"max_length": 1024, "epochs": 1}))
        assert prediction is not None
        return prediction

    three = [chat({}, {}, {})] * 8
    assert work(*three).supervised == pytest.approx(300 / 601, rel=0.01)
    assert work(*three, learn="last").supervised == pytest.approx(100 / 601, rel=0.01)
    assert work(*three).tokens == work(*three, learn="last").tokens == 8 * 601
    first = [chat({}, {"weight": 0})] * 8  # nothing is left to learn but the first answer
    assert work(*first).tokens == 8 * 401
    assert work(*three, *first, learn="last").tokens == 8 * 601
    assert work({"text": "t" * 430}, format="text").supervised == 1
