"""Losses and gradients of TRL's ``GRPOTrainer._compute_loss``, for its four loss types, both ways.

Old log-probabilities differ from the policy's, so that both clips are active. The model is a tiny
random llama in float32; ours in several micro-batches, TRL's in one. Needs PyTorch and TRL; skipped
without them.
Run: ``make parity``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.config.reward import LossType, RewardConfig
from mlx_slim.data.batches import collate
from mlx_slim.export.model import export_hf
from mlx_slim.models.load import load
from mlx_slim.rewards.advantages import advantages
from mlx_slim.rewards.losses import PolicyLoss
from mlx_slim.rewards.objective import PolicyColumns, PolicyObjective
from mlx_slim.training.step import Stepper
from mlx_slim.training.step_result import StepResult
from tests.parity.optional import needed
from tests.parity.torch_side import torch, transformers
from tests.support.tiny import TinyModels

trl = needed("trl")
datasets = needed("datasets")
grpo = needed("trl.trainer.grpo_trainer")

PROMPTS, ANSWERS = [7, 4, 9, 5, 6, 8], [5, 11, 3, 8, 1, 6]  # tokens of each row
CUT = 5  # the row that was cut at the longest answer, where these are masked
LONGEST = 16
LOW, HIGH = 0.1, 0.15
PLAN = [[[0], [1]], [[2], [3], [4]], [[5]]]


class DrawnRows:
    """Prompts with drawn answers, and what is known of these."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.ids = [rng.integers(3, 200, p + a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        self.old = [rng.normal(-5.6, 0.4, answer) for answer in ANSWERS]
        self.reference = [rng.normal(-5.6, 0.4, answer) for answer in ANSWERS]
        self.advantage = advantages(rng.normal(size=len(ANSWERS)), 3, divide=True)
        self.lengths = np.array([len(ids) for ids in self.ids])
        self.supervised = np.array(ANSWERS)

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[i].astype(np.int32), np.arange(len(self.ids[i])) >= PROMPTS[i]

    def weights(self, i: int) -> np.ndarray | None:
        return None


ROWS = DrawnRows()


@pytest.fixture(scope="module")
def trainers(
    tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[float], Any]]:
    """Return a function: temperature -> TRL's trainer of the tiny llama."""
    by_temperature: dict[float, Any] = {}
    folder = tmp_path_factory.mktemp("hf") / "llama"
    export_hf(tiny(), folder)

    def get(temperature: float) -> Any:
        if temperature not in by_temperature:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            by_temperature[temperature] = grpo.GRPOTrainer(
                model=str(folder),
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                args=trl.GRPOConfig(
                    output_dir=str(tmp_path_factory.mktemp("trl")),
                    report_to=[],
                    use_cpu=True,
                    bf16=False,
                    model_init_kwargs={"dtype": "float32"},
                    activation_checkpointing=False,
                    num_generations=2,
                    per_device_train_batch_size=2,
                    max_completion_length=LONGEST,
                    temperature=temperature,
                    beta=0.04,
                    epsilon=LOW,
                    epsilon_high=HIGH,
                ),
                train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 2),
                processing_class=tokenizer,
            )
            by_temperature[temperature].current_gradient_accumulation_steps = 1
        return by_temperature[temperature]

    yield get


def padded(rows: list[Any], *, left: bool = False) -> Any:
    """Return rows side by side, padded with zeros."""
    width = max(map(len, rows))
    sides = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
    return torch.tensor(np.stack([np.pad(row, s) for row, s in zip(rows, sides, strict=True)]))


def theirs(trainer: Any, config: RewardConfig) -> tuple[float, dict[str, np.ndarray], Any]:
    """Return TRL's loss, its gradients by name, and its metrics."""
    trainer.loss_type, trainer.beta = config.loss_type, config.beta
    trainer.args.use_bias_correction_kl = config.use_bias_correction_kl
    split = [(ids[:n], ids[n:]) for ids, n in zip(ROWS.ids, PROMPTS, strict=True)]
    mask = padded([np.ones(answer, int) for answer in ANSWERS])
    if config.mask_truncated:
        mask[CUT] = 0
    inputs = {
        "prompt_ids": padded([prompt for prompt, _ in split], left=True),
        "prompt_mask": padded([np.ones(prompt, int) for prompt in PROMPTS], left=True),
        "completion_ids": padded([answer for _, answer in split]),
        "completion_mask": mask,
        "advantages": torch.tensor(ROWS.advantage),
        "old_per_token_logps": padded(ROWS.old).float(),
        "ref_per_token_logps": padded(ROWS.reference).float(),
        "num_items_in_batch": mask.sum(),
    }
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {
        name: value.grad.numpy().copy() for name, value in trainer.model.named_parameters()
    }
    return loss.item(), gradients, trainer._metrics["train"]


def ours(folder: Path, config: RewardConfig, temperature: float) -> StepResult:
    """Return our step over the same rows, in three micro-batches."""
    model = load(folder, dtype=mx.float32).model
    columns = PolicyColumns.of(
        config.loss_type,
        LONGEST,
        ROWS.supervised,
        (np.arange(len(ROWS)) != CUT) | (not config.mask_truncated),
        ROWS.advantage,
        np.concatenate(ROWS.old),
        np.concatenate(ROWS.reference) if config.beta else None,
    )
    token_loss = PolicyLoss(
        config.epsilon,
        config.upper,
        config.beta,
        config.use_bias_correction_kl,
        temperature,
    )
    stepper = Stepper(model, PolicyObjective(token_loss, lambda: columns, model, chunk=7))
    return stepper.step(collate(ROWS, groups, isolate=False) for groups in PLAN)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "dapo"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.04},
        {"beta": 0.04, "use_bias_correction_kl": False, "temperature": 0.7},
        {"beta": 0.04, "mask_truncated": True},
    ],
    ids=["no-reference", "reference", "plain-kl-temperature", "masked"],
)
def test_the_loss_is_that_of_trl(
    tiny: TinyModels,
    trainers: Callable[[float], Any],
    loss_type: LossType,
    changes: dict[str, Any],
) -> None:
    changes = dict(changes)
    temperature = changes.pop("temperature", 1.0)
    config = RewardConfig(loss_type=loss_type, epsilon=LOW, epsilon_high=HIGH, **changes)
    loss, gradients, metrics = theirs(trainers(temperature), config)
    result = ours(tiny(), config, temperature)
    assert result.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    largest = max(np.abs(value).max() for value in gradients.values())
    assert largest > 1e-3
    assert set(result.gradients) == set(gradients)
    for name, value in gradients.items():
        assert np.abs(np.array(result.gradients[name]) - value).max() < 1e-4 * largest, name
    low, high = metrics["clip_ratio/low_mean"][0], metrics["clip_ratio/high_mean"][0]
    assert low > 0 and high > 0, "both clips are to be active"
    assert result.metrics["clip_low"] == pytest.approx(low, abs=1e-6)
    assert result.metrics["clip_high"] == pytest.approx(high, abs=1e-6)
    assert result.metrics["entropy"] == pytest.approx(metrics["entropy"][0], rel=1e-4)
    if config.beta:
        assert result.metrics["kl"] == pytest.approx(metrics["kl"][0], rel=1e-4)


def test_advantages_are_those_of_trl() -> None:
    rewards = np.random.default_rng(2).normal(size=12)
    grouped = torch.tensor(rewards, dtype=torch.float32).view(-1, 4)
    spread = grpo.nanstd(grouped, dim=1)[:, None]
    expected = (grouped - grouped.mean(dim=1, keepdim=True)) / (spread + 1e-4)
    ours = advantages(rewards, 4, divide=True)
    assert np.abs(ours - expected.reshape(-1).numpy()).max() < 1e-5
