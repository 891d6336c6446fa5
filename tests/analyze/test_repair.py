"""Repaired adapters: the formula in dense float64, the same rank, other weights as they were."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_slim.adapters.inject import adapters_of, inject
from mlx_slim.adapters.store import load_adapter, save_adapter
from mlx_slim.analyze.intruders import adapted_model, pairs_of
from mlx_slim.analyze.repair import repair_intruders, truncated
from mlx_slim.artifacts import load_tensors
from mlx_slim.cli import analyze
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load
from tests.support.tiny import TinyModels

TARGETS = ["q_proj", "k_proj", "down_proj", "up_proj"]


def moved_adapter(
    folder: Path, out: Path, *, rank: int = 2, dora: bool = False, targets: list[str] | None = None
) -> Path:
    """Write an adapter whose first layers moved far and whose last ones hardly did."""
    model = load(folder).model
    config = AdapterConfig(rank=rank, alpha=6, targets=targets or TARGETS)
    injected = inject(model, config, dora=dora)
    adapters = adapters_of(model)
    for index, (_, adapter) in enumerate(adapters):
        strength = 1.0 if index < len(adapters) / 2 else 1e-4
        noise = mx.random.normal(adapter.lora_b.shape, key=mx.random.key(index))
        adapter.lora_b = strength * noise
    save_adapter(out, model, config, injected, dora=dora, base=str(folder))
    return out


def dense(base: np.ndarray, tuned: np.ndarray, keep: float, rank: int) -> np.ndarray:
    """Return the repaired update by full singular value decompositions, as the paper has it."""
    base, tuned = base.astype(np.float64), tuned.astype(np.float64)
    before = np.linalg.svd(base, full_matrices=False)[0]
    u, s, vt = np.linalg.svd(tuned, full_matrices=False)
    intruding = np.abs(before.T @ u[:, :10]).max(axis=0) < 0.5
    intruders = (u[:, :10] * s[:10])[:, intruding] @ vt[:10][intruding]
    u, s, vt = np.linalg.svd(tuned + (keep - 1) * intruders - base, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize(
    ("architecture", "rank", "targets"),
    [
        ("llama", 2, None),
        ("llama", 32, ["k_proj", "q_proj"]),  # a rank as high as the outputs of k_proj
        ("llama", 3, ["q_proj", "embed_tokens"]),
        ("qwen3_moe", 2, ["q_proj", "switch_mlp.up_proj"]),
    ],
)
@pytest.mark.parametrize("keep", [0.75, 0.0])
def test_the_update_is_that_of_dense_decompositions(
    tiny: TinyModels,
    tmp_path: Path,
    architecture: str,
    rank: int,
    targets: list[str] | None,
    keep: float,
) -> None:
    folder = tiny(architecture)
    adapter = moved_adapter(folder, tmp_path / "a", rank=rank, targets=targets)
    repaired = repair_intruders(str(folder), adapter, keep)
    out = tmp_path / "b"
    out.mkdir()
    repaired.write(out)
    before, after = (adapters_of(adapted_model(str(folder), each)) for each in (adapter, out))
    changed = set(repaired.as_record()["repaired"])
    weights = 0
    for (path, old), (_, new) in zip(before, after, strict=True):
        assert old.lora_a.shape == new.lora_a.shape
        for one, other in zip(pairs_of(old, path), pairs_of(new, path), strict=True):
            weights += 1
            update = other.tuned_OI - other.base_OI
            if one.path in changed:
                expected = dense(one.base_OI, one.tuned_OI, keep, rank)
                assert np.abs(update - expected).max() < 1e-4 * np.abs(expected).max()
            else:
                assert np.array_equal(update, one.tuned_OI - one.base_OI)
    assert 0 < len(changed) < weights
    assert repaired.after.overall()["delta_norm"] < repaired.before.overall()["delta_norm"]


def test_a_product_is_cut_to_a_rank_without_being_formed() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((30, 5)), rng.standard_normal((5, 20))
    one, other = truncated(left, right, 5)
    assert one @ other == pytest.approx(left @ right)
    assert np.linalg.norm(one, axis=0) == pytest.approx(np.linalg.norm(other, axis=1))
    one, other = truncated(left, right, 25)
    assert one.shape == (30, 25) and other.shape == (25, 20)
    assert one @ other == pytest.approx(left @ right)


def test_the_command_writes_an_adapter_that_loads(tiny: TinyModels, tmp_path: Path) -> None:
    folder, out = str(tiny("llama")), tmp_path / "out"
    adapter = moved_adapter(tiny("llama"), tmp_path / "a")
    run = CliRunner().invoke
    words = ["intruders", folder, "--adapter", str(adapter), "--no-cache", "--repair", "0.75"]
    result = run(analyze.command, [*words, "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "0.75 of each intruder kept" in result.stdout
    record = json.loads((out / "intruders.json").read_text())
    assert record["repair"]["keep"] == 0.75 and record["repair"]["repaired"]
    assert record["repair"]["overall"]["delta_norm"] < record["overall"]["delta_norm"]
    model = load(folder).model
    load_adapter(model, out)
    old, new = (load_tensors(each / "adapters.safetensors") for each in (adapter, out))
    assert {name: (t.shape, t.dtype) for name, t in old.items()} == {
        name: (t.shape, t.dtype) for name, t in new.items()
    }
    assert "is complete: nothing to do" in str(
        run(analyze.command, [*words, "-o", str(out)]).exception
    )
    other = [*words[:-1], "0.5", "-o", str(out)]
    assert "exists already" in str(run(analyze.command, other).exception)
    for wrong in (["--repair", "1.5"], ["--repair", "-1"]):
        refused = run(analyze.command, [*words[:5], *wrong, "-o", str(tmp_path / "none")])
        assert refused.exit_code == 2
    refused = run(
        analyze.command,
        ["intruders", folder, "--tuned", folder, "--repair", "0.5", "-o", str(tmp_path / "none")],
    )
    assert refused.exit_code == 2 and "--repair takes --adapter" in refused.output
    assert not (tmp_path / "none").exists()


def test_the_quantized_base_is_named_without_its_place(tiny: TinyModels, tmp_path: Path) -> None:
    """A repaired QLoRA adapter lies elsewhere: its base is quantized again, to the same weights."""
    adapter = moved_adapter(tiny("llama"), tmp_path / "run" / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["quantized_base"] = {
        "model": str(tiny("llama")),
        "revision": None,
        "quantize": {"bits": 4, "group_size": 32, "mode": "affine"},
        "dtype": "float32",
        "stored": "float32",
        "folder": "../base",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    repaired = repair_intruders(str(tiny("llama")), adapter, 0.5)
    assert repaired.config["quantized_base"] == {**config["quantized_base"], "folder": None}
    out = tmp_path / "b"
    out.mkdir()
    repaired.write(out)
    old, new = (
        next(pairs_of(module, path))
        for path, module in (
            adapters_of(adapted_model(str(tiny("llama")), each))[0] for each in (adapter, out)
        )
    )
    assert np.array_equal(old.base_OI, new.base_OI)
    assert len(np.unique(old.base_OI[0, :32])) <= 16  # rounded: a group has 16 levels


def test_dora_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    adapter = moved_adapter(tiny("llama"), tmp_path / "a", dora=True)
    with pytest.raises(SlimError, match="is a DoRA adapter"):
        repair_intruders(str(tiny("llama")), adapter, 0.75)
