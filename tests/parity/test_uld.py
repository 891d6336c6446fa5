"""Distillation across tokenizers: loss and gradients equal those of TRL's ``ULDLoss``.

Both sides get the same rows, logits and supervised tokens; TRL's own functions give the byte
offsets that it aligns by. Needs TRL; skipped without it. Run: ``make parity``.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.config.load import from_values
from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import collate
from mlx_slim.data.tokenize import unwrap
from mlx_slim.distillation.teachers import load_teacher
from mlx_slim.distillation.uld import ULDDistillation
from mlx_slim.models.load import load_tokenizer
from mlx_slim.runtime import to_float
from mlx_slim.training.optim import set_trainable, trainable
from mlx_slim.training.step import Stepper
from tests.parity.optional import needed
from tests.support.runs import Recorder, recipe
from tests.support.vocabularies import student_of_words, teacher_of_words, write_conversations

torch = needed("torch")
gold: Any = needed("trl.experimental.gold.gold_trainer")
trl_utils: Any = needed("trl.experimental.utils")
IGNORED = -100


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A student and a teacher of different vocabularies, and rows."""
    folder = tmp_path_factory.mktemp("pair")
    rows = write_conversations(folder / "rows.jsonl")
    return student_of_words(folder / "student"), teacher_of_words(folder / "teacher"), rows


def _recipe(
    pair: tuple[Path, Path, Path], weight: float, temperature: float, beta: float = 0.0, **uld: Any
) -> Recipe:
    student, teacher, rows = pair
    plain = recipe(student, rows, "full").recipe.model_dump(exclude_unset=True)
    plain["data"]["validation"] = 0
    plain["distill"] = {
        "teachers": [{"model": str(teacher)}],
        "method": "uld",
        "top_k": "all",
        "weight": weight,
        "temperature": temperature,
        "uld": uld,
        "beta": beta if 0 < beta < 1 else None,
        "divergence": {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd"),
    }
    return from_values(plain, "small", "test").recipe


def _side(tokenizer: Any, prompts: list[np.ndarray], answers: list[str]) -> tuple[Any, Any, Any]:
    """Return ids, labels and byte offsets, padded on the right, as TRL's collator makes them."""
    eos = tokenizer.eos_token_id
    rows = []
    encoded = trl_utils.encode_with_byte_offsets(tokenizer.backend_tokenizer, answers)
    for prompt, (ids, offsets), text in zip(prompts, encoded, answers, strict=True):
        size = len(text.encode())
        rows.append(
            (
                [*prompt.tolist(), *ids, eos],
                [IGNORED] * len(prompt) + [*ids, eos],
                [(0, 0)] * len(prompt) + [*offsets, (size, size)],
            )
        )
    width = max(len(ids) for ids, *_ in rows)
    ids = torch.tensor([r[0] + [0] * (width - len(r[0])) for r in rows])
    labels = torch.tensor([r[1] + [IGNORED] * (width - len(r[1])) for r in rows])
    offsets = torch.tensor([r[2] + [(0, 0)] * (width - len(r[2])) for r in rows])
    return ids, labels, offsets


def _prompts(model: Path, rows: list[dict[str, str]]) -> list[np.ndarray]:
    """Return the ids before each answer."""
    tokenizer = unwrap(load_tokenizer(model))
    prompts = []
    for row in rows:
        message = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        prompts.append(np.array(tokenizer(text, add_special_tokens=False).input_ids))
    return prompts


def _trl(config: dict[str, Any], student: Any, teacher: Any, sides: Any, tokenizers: Any) -> Any:
    loss = gold.ULDLoss(SimpleNamespace(**config), *tokenizers, device="cpu")
    (ids, labels, offsets), (other_ids, other_labels, other_offsets) = sides
    return loss(
        student, teacher, labels, other_labels, ids, other_ids, offsets, other_offsets
    ).sum()


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
@pytest.mark.parametrize(
    ("uld", "temperature", "weight"),
    [
        ({"extended": False}, 1.0, 1.0),
        ({"extended": True}, 1.0, 1.0),
        ({"extended": True}, 2.0, 0.4),
        ({"extended": True, "hybrid": True, "beta": 0.5}, 1.0, 1.0),
        ({"extended": True, "hybrid": True, "beta": 0.0}, 1.0, 1.0),
        ({"hybrid": True, "beta": 1.0, "matched_weight": 2.0, "unmatched_weight": 0.5}, 1.5, 0.5),
    ],
)
def test_loss_and_gradients_equal_those_of_trl(
    pair: tuple[Path, Path, Path],
    tmp_path: Path,
    merge: str,
    uld: dict[str, Any],
    temperature: float,
    weight: float,
) -> None:
    student_folder, teacher_folder, file = pair
    settings = _recipe(pair, weight, temperature, merge=merge, **uld)
    assert settings.distill is not None
    strategy = ULDDistillation(settings.distill, settings.distill.teachers)
    strategy.check(settings)
    tuned = strategy.student.prepare(settings)
    data = strategy.rows(settings, tuned, tmp_path, unchanged=False)
    assert strategy.targets.generate(Recorder())
    objective, _ = strategy.objectives(tuned.model, 5, tuned.config["vocab_size"], 1)
    batch = collate(data.train, [[row] for row in range(len(data.train))], isolate=False)
    sums, gradients = Stepper(tuned.model, objective).micro(batch)
    count = len(batch.targets_N)

    rows = [json.loads(line) for line in file.read_text().splitlines()]
    answers = [row["completion"] for row in rows]
    tokenizers = [unwrap(load_tokenizer(folder)) for folder in (student_folder, teacher_folder)]
    sides = [
        _side(tokenizer, _prompts(folder, rows), answers)
        for tokenizer, folder in zip(tokenizers, (student_folder, teacher_folder), strict=True)
    ]
    ids_BT = mx.array(sides[0][0].numpy())
    for row, ids in enumerate(sides[0][0].tolist()):  # the same rows on both sides
        assert ids[: len(data.train.row(row)[0])] == data.train.row(row)[0].tolist()
    parameters = trainable(tuned.model)
    logits = tuned.model(ids_BT).astype(mx.float32)
    teacher = load_teacher(settings.distill.teachers[0], mx.float32)
    teacher_logits = teacher(mx.array(sides[1][0].numpy()))
    student_torch = torch.tensor(np.array(logits), requires_grad=True)
    config = {
        "uld_crossentropy_weight": 1 - weight,
        "uld_distillation_weight": weight,
        "uld_student_temperature": temperature,
        "uld_teacher_temperature": temperature,
        "uld_skip_student_eos": True,
        "uld_skip_teacher_eos": True,
        "use_extended_uld": settings.distill.uld.extended,
        "uld_token_merge_strategy": merge,
        "uld_use_hybrid_loss": settings.distill.uld.hybrid,
        "uld_hybrid_matched_weight": settings.distill.uld.matched_weight,
        "uld_hybrid_unmatched_weight": settings.distill.uld.unmatched_weight,
        "beta": settings.distill.jsd_beta,
    }
    expected = _trl(
        config, student_torch, torch.tensor(np.array(teacher_logits)), sides, tokenizers
    )
    expected.backward()
    assert to_float(sums[0]) / count == pytest.approx(expected.item(), rel=2e-5)

    assert student_torch.grad is not None
    cotangent = mx.array(student_torch.grad.numpy())

    def linear(values: dict[str, mx.array]) -> mx.array:
        set_trainable(tuned.model, values)
        return (tuned.model(ids_BT).astype(mx.float32) * cotangent).sum()

    theirs = mx.grad(linear)(parameters)
    largest = max(to_float(mx.abs(value).max()) for value in theirs.values())
    assert largest > 1e-3
    for path, value in gradients.items():
        gap = to_float(mx.abs(value / count - theirs[path]).max())
        assert gap < 1e-4 * largest, path
