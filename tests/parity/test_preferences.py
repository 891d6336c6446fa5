"""Losses, rewards and gradients of preference tuning are TRL's, on the same weights and rows.

A tiny llama in float32 through the loss functions of TRL's own trainers. Needs PyTorch and TRL;
skipped without them. Run: ``make parity``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.config.preference import PreferenceConfig
from mlx_slim.data.batches import Batcher
from mlx_slim.data.with_prompts import WithPrompts
from mlx_slim.export.model import export_hf
from mlx_slim.models.load import load
from mlx_slim.preferences.objective import KtoObjective, PairObjective
from mlx_slim.preferences.rows import MismatchedRows
from mlx_slim.preferences.scorer import RowScorer
from mlx_slim.training.step import Stepper
from mlx_slim.training.step_result import StepResult
from tests.parity.optional import needed
from tests.parity.torch_side import in_torch, torch
from tests.preferences.support import Rows
from tests.support.tiny import VOCAB, TinyModels

needed("trl")
from trl import DPOTrainer, KTOTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

TOLERANCE = 1e-4  # of the largest gradient
FUSED = ("log_probs", "entropy", "mean_logits", "is_top1")
IGNORED = -100


@pytest.fixture(scope="module")
def folders(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the policy and a reference that differs from it."""
    root = tmp_path_factory.mktemp("preferences")
    export_hf(tiny("llama"), root / "policy")
    shutil.copytree(root / "policy", root / "reference")
    model = in_torch(root / "policy")
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1 + 0.3 * torch.randn_like(value))
    model.save_pretrained(root / "reference")
    return root / "policy", root / "reference"


def _rows(answers: int) -> Rows:
    """Return ``answers`` answers to each of six prompts."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(6):
        prompt = random.integers(3, 250, random.integers(4, 12)).tolist()
        sizes = random.integers(2, 14, answers)
        rows += [(prompt, random.integers(3, 250, size).tolist()) for size in sizes]
    return Rows(rows)


class Accelerator(SimpleNamespace):
    """One process on a CPU."""

    device = "cpu"

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = gather


def _trainer(kind: type, model: Any, **settings: Any) -> Any:
    """Return a trainer without its set-up: what its loss reads, and nothing else."""
    trainer: Any = object.__new__(kind)
    values = {
        "model": model,
        "accelerator": Accelerator(),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "precompute_ref_logps": False,
        "is_encoder_decoder": False,
        "padding_value": 0,
        "pad_token_id": 0,
        "label_smoothing": 0.0,
        **settings,
    }
    for name, value in values.items():
        setattr(trainer, name, value)
    return trainer


def _padded(rows: list[list[int]], fill: int) -> Any:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def _sides(rows: Rows) -> dict[str, Any]:
    """Return TRL's batch of ORPO and CPO."""
    batch = {}
    for side, name in enumerate(("chosen", "rejected")):
        some = rows.rows[side::2]
        batch[f"{name}_input_ids"] = _padded([p + a for p, a in some], 0)
        batch[f"{name}_attention_mask"] = _padded([[1] * len(p + a) for p, a in some], 0)
        batch[f"{name}_labels"] = _padded([[IGNORED] * len(p) + a for p, a in some], IGNORED)
    return batch


def _concatenated(rows: Rows) -> dict[str, Any]:
    """Return TRL's batch of DPO: the chosen rows, then the rejected ones."""
    some = rows.rows[::2] + rows.rows[1::2]
    return {
        "input_ids": _padded([p + a for p, a in some], 0),
        "attention_mask": _padded([[1] * len(p + a) for p, a in some], 0),
        "completion_mask": _padded([[0] * len(p) + [1] * len(a) for p, a in some], 0),
    }


def _theirs(loss: Any, model: Any) -> tuple[float, dict[str, np.ndarray]]:
    model.zero_grad()
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {name: value.grad.numpy() for name, value in named}


def _check(ours: StepResult, theirs: tuple[float, dict[str, np.ndarray]]) -> None:
    loss, gradients = theirs
    assert ours.loss == pytest.approx(loss, rel=2e-5)
    assert ours.gradients.keys() == gradients.keys()
    largest = max(np.abs(value).max() for value in gradients.values())
    assert largest > 0
    for name, value in gradients.items():
        assert np.abs(np.array(ours.gradients[name]) - value).max() <= TOLERANCE * largest, name


def _models(folders: tuple[Path, Path]) -> Iterator[Any]:
    for folder in folders:
        yield load(folder, dtype=mx.float32).model


def _step(objective: Any, model: Any, rows: Any, unit: int) -> StepResult:
    model.unfreeze()
    batcher = Batcher(rows, 4096, 128, "grouped", 0, unit=unit)
    batches = [batcher.batch(groups) for groups in batcher.plan(0)]
    assert len(batches) == 1
    return Stepper(model, objective).step(batches)


def _reference(rows: Any, model: Any) -> Any:
    scorer = RowScorer(rows, model, None, VOCAB, 1)
    values = scorer(model, range(len(rows)))
    return lambda numbers: values[numbers]


DPO = [
    ("sigmoid", {}),
    ("sigmoid", {"beta": 0.5}),
    ("ipo", {"beta": 0.3}),
    ("robust", {"label_smoothing": 0.2}),
]


@pytest.mark.parametrize(("loss", "settings"), DPO)
def test_dpo(folders: tuple[Path, Path], loss: str, settings: dict[str, float]) -> None:
    rows, config = _rows(2), PreferenceConfig(loss=loss, **settings)  # type: ignore[arg-type]
    policy, reference = map(in_torch, folders)
    for model in (policy, reference):
        add_fused_lm_head(model, outputs=FUSED)
    trainer = _trainer(
        DPOTrainer,
        policy,
        ref_model=reference,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        loss_types=[loss],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
    )
    policy.train()
    theirs = _theirs(trainer._compute_loss(policy, _concatenated(rows), False), policy)
    ours_policy, ours_reference = _models(folders)
    scored = _reference(rows, ours_reference)
    objective = PairObjective(config, scored, rows, ours_policy, 7, VOCAB)
    ours = _step(objective, ours_policy, rows, 2)
    _check(ours, theirs)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert ours.metrics[name] == pytest.approx(
            trainer._metrics["train"][name][-1], rel=1e-4, abs=1e-5
        )
    assert abs(ours.metrics["rewards/margins"]) > 1e-4


def test_conservative_dpo_is_cpo_on_log_ratios(folders: tuple[Path, Path]) -> None:
    rows, config = _rows(2), PreferenceConfig(label_smoothing=0.2)
    policy, reference = map(in_torch, folders)
    sides = _sides(rows)

    def log_probs(model: Any, side: str) -> Any:
        ids, mask = sides[f"{side}_input_ids"], sides[f"{side}_attention_mask"]
        logits = model(ids, attention_mask=mask).logits
        return CPOTrainer.get_batch_logps(logits, sides[f"{side}_labels"].clone())

    with torch.no_grad():
        base = [log_probs(reference, side) for side in ("chosen", "rejected")]
    ratios = [
        log_probs(policy, side) - value
        for side, value in zip(("chosen", "rejected"), base, strict=True)
    ]
    trainer = _trainer(
        CPOTrainer, policy, beta=0.1, label_smoothing=0.2, loss_type="sigmoid", alpha=0.0
    )
    losses, chosen, rejected = trainer.cpo_loss(*ratios)
    theirs = _theirs(losses.mean(), policy)
    ours_policy, ours_reference = _models(folders)
    scored = _reference(rows, ours_reference)
    ours = _step(PairObjective(config, scored, rows, ours_policy, 7, VOCAB), ours_policy, rows, 2)
    _check(ours, theirs)
    margin = (chosen - rejected).mean().item()
    assert ours.metrics["rewards/margins"] == pytest.approx(margin, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(folders: tuple[Path, Path], smoothing: float) -> None:
    rows = _rows(2)
    config = PreferenceConfig(loss="simpo", beta=2, simpo_gamma=0.7, label_smoothing=smoothing)
    policy = in_torch(folders[0])
    trainer = _trainer(
        CPOTrainer,
        policy,
        beta=2.0,
        simpo_gamma=0.7,
        label_smoothing=smoothing,
        loss_type="simpo",
        alpha=0.0,
        cpo_alpha=0.0,
    )
    loss, metrics = trainer.get_batch_loss_metrics(policy, _sides(rows))
    theirs = _theirs(loss, policy)
    model = next(_models(folders))
    ours = _step(PairObjective(config, None, rows, model, 7, VOCAB), model, rows, 2)
    _check(ours, theirs)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert ours.metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5)


def test_orpo(folders: tuple[Path, Path]) -> None:
    rows = _rows(2)
    config = PreferenceConfig(loss="orpo", beta=0.3, nll="all")
    policy = in_torch(folders[0])
    trainer = _trainer(ORPOTrainer, policy, beta=0.3)
    loss, metrics = trainer.get_batch_loss_metrics(policy, _sides(rows))
    theirs = _theirs(loss, policy)
    model = next(_models(folders))
    view = WithPrompts(rows, 2)
    objective = PairObjective(config, None, view, model, 7, VOCAB, 1, view.answers_S)
    ours = _step(objective, model, view, 2)
    _check(ours, theirs)
    assert len(ours.metrics) == 6
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "nll_loss"):
        assert ours.metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("swapped", [False, True])
def test_kto(folders: tuple[Path, Path], swapped: bool) -> None:
    """With one order of the two models z is positive, with the other one it is cut off at 0."""
    folders = (folders[1], folders[0]) if swapped else folders
    rows = _rows(1)
    desirable = np.array([True, False, True, True, False, True])
    config = PreferenceConfig(loss="kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.8)
    policy, reference = map(in_torch, folders)
    for model in (policy, reference):
        add_fused_lm_head(model, outputs=FUSED)
    answers = [answer for _, answer in rows.rows]
    examples = [
        {"prompt_ids": p, "completion_ids": a, "KL_completion_ids": other, "label": bool(label)}
        for (p, a), other, label in zip(
            rows.rows, [answers[-1], *answers[:-1]], desirable, strict=True
        )
    ]
    trainer = _trainer(
        KTOTrainer,
        policy,
        ref_model=reference,
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.8,
        loss_type="kto",
        calculate_KL=True,
    )
    policy.train()
    batch = DataCollatorForUnpairedPreference(pad_token_id=0)(examples)
    theirs = _theirs(trainer._compute_loss(policy, batch, False), policy)
    ours_policy, ours_reference = _models(folders)
    mismatched = MismatchedRows(rows, 128)
    objective = KtoObjective(
        config,
        _reference(rows, ours_reference),
        RowScorer(mismatched, ours_policy, 7, VOCAB, 1),
        _reference(mismatched, ours_reference),
        desirable,
        64,
        rows,
        ours_policy,
        7,
        VOCAB,
    )
    ours = _step(objective, ours_policy, rows, 1)
    _check(ours, theirs)
    logged = trainer._metrics["train"]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl"):
        assert ours.metrics[name] == pytest.approx(logged[name][-1], rel=1e-4, abs=1e-5)
    assert ours.metrics["kl"] > 0.1 if swapped else ours.metrics["kl"] == 0
