"""Repaired adapters against PEFT's ``reduce_intruder_dimension``: the same product B A.

Its code keeps ``mitigation_lambda`` of each intruder (its docstring says that it is subtracted).
Needs PyTorch; skipped without it. Run: ``make parity``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_slim.analyze.repair import repair_intruders
from mlx_slim.export.model import export_hf
from mlx_slim.export.peft import import_peft
from tests.parity.torch_side import in_torch, peft, torch
from tests.support.tiny import TinyModels

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens"]


def moved(folder: Path, out: Path, **settings: Any) -> Any:
    """Return PEFT's model with an adapter, saved in ``out``: block 1 hardly moved, the rest far."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=TARGETS, **settings
    )
    model = peft.get_peft_model(in_torch(folder), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.add_((1e-4 if "layers.1" in name else 0.15) * torch.randn_like(value))
    model.save_pretrained(out)
    return model


def product(layer: Any, adapter: str) -> np.ndarray:
    """Return B A of a layer in PEFT as a weight (O, I); of an embedding (V, D).

    PEFT leaves the factors of a repaired embedding the other way round, (V, R) and (R, D): their
    product is the update, but the layer can't be run any more.
    """
    if adapter in layer.lora_B:
        b, a = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        return (b @ a).detach().numpy()
    b, a = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    update = (b @ a).detach().numpy()
    return update if b.shape[0] == layer.get_base_layer().weight.shape[0] else update.T


@pytest.mark.parametrize("keep", [0.75, 0.3, 0.0])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_the_product_is_that_of_peft(
    tiny: TinyModels, tmp_path: Path, keep: float, settings: dict[str, Any]
) -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    base = tmp_path / "base"
    export_hf(tiny("llama"), base)
    model = moved(base, tmp_path / "peft", **settings)
    lines: list[str] = []
    reduce_intruder_dimension(model, mitigation_lambda=keep, logging_sink=lines.append)
    import_peft(tmp_path / "peft", tmp_path / "a", base=str(base))
    repaired = repair_intruders(str(base), tmp_path / "a", keep)
    checked = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        path = name.removeprefix("base_model.model.")
        a, b = (np.array(repaired.tensors[f"{path}.{factor}"]) for factor in ("lora_a", "lora_b"))
        embeds = path.endswith("embed_tokens")
        update, expected = (a @ b) if embeds else (a @ b).T, product(layer, "intruder_reduced")
        assert np.abs(update - expected).max() < 1e-4 * np.abs(expected).max(), path
        checked += 1
    assert checked == 16
    theirs = {
        line.split(":")[0].removeprefix("base_model.model.")
        for line in lines
        if "Intruders:" in line
    }
    assert set(repaired.as_record()["repaired"]) == theirs
    assert "model.embed_tokens" in theirs and 1 < len(theirs) < 16
