"""Adapters by every ``init_lora_weights`` of the real peft: the same logits here, or refused.

Needs PyTorch; skipped without it. Run: ``make parity``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_slim.adapters.inject import sites
from mlx_slim.adapters.peft_targets import targeted
from mlx_slim.errors import SlimError
from mlx_slim.export.model import export_hf
from mlx_slim.export.peft import import_peft
from mlx_slim.models.load import load
from tests.export.test_peft import BEYOND, NAMED
from tests.parity.torch_side import (
    gap,
    in_torch,
    mlx_logits,
    peft,
    torch,
    torch_logits,
)
from tests.support.tiny import TinyModels

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "llama"
    export_hf(tiny("llama"), folder)
    return folder


def tuned(
    folder: Path, out: Path, start: Any, convert: bool = False, **settings: Any
) -> np.ndarray:
    """Start an adapter in peft, move it as training would, save it; return its logits."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": EVERY, **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=start, **settings)
    model = peft.get_peft_model(in_torch(folder), config)
    initial = out.parent / "initial"
    if convert:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(initial)
        model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    more = {"path_initial_model_for_weight_conversion": str(initial)} if convert else {}
    model.save_pretrained(out, **more)
    return torch_logits(model)


STARTS = [
    *((start, {}) for start in (True, False, "gaussian", "eva", "mica", "orthogonal")),
    ("gaussian", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True}),
    ("mica", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}}),
    ("pissa", {}),
    ("pissa", {"use_rslora": True, "rank_pattern": {"v_proj": 2, "layers.0.*down_proj": 7}}),
    ("pissa", {"use_dora": True, "fan_in_fan_out": True}),
    ("pissa", {"r": 40, "target_modules": ["k_proj", "embed_tokens"]}),
    ("olora", {}),
    ("olora", {"use_dora": True, "alpha_pattern": {"k_proj": 3}}),
    ("olora", {"r": 40, "target_modules": ["k_proj", "lm_head"]}),
]


@pytest.mark.parametrize(("start", "settings"), STARTS)
def test_a_start_gives_the_logits_of_peft(
    base: Path, tmp_path: Path, start: Any, settings: dict[str, Any]
) -> None:
    expected = tuned(base, tmp_path / "peft", start, **settings)
    loaded = peft.PeftModel.from_pretrained(in_torch(base), tmp_path / "peft")
    assert gap(expected, torch_logits(loaded)) < 1e-4
    import_peft(tmp_path / "peft", tmp_path / "a", base=str(base))
    assert gap(expected, mlx_logits(base, tmp_path / "a")) < 1e-4
    assert gap(expected, mlx_logits(base)) > 1e-2


def test_a_start_that_cannot_be_computed_again_goes_the_way_the_error_names(
    base: Path, tmp_path: Path
) -> None:
    expected = tuned(base, tmp_path / "changed", "pissa_niter_4")
    with pytest.raises(SlimError, match="gives wrong results") as caught:
        import_peft(tmp_path / "changed", tmp_path / "a", base=str(base))
    assert "path_initial_model_for_weight_conversion" in caught.value.hint
    settings = json.loads((tmp_path / "changed" / "adapter_config.json").read_text())
    settings["init_lora_weights"] = True  # as plain LoRA it is another model indeed
    (tmp_path / "changed" / "adapter_config.json").write_text(json.dumps(settings))
    import_peft(tmp_path / "changed", tmp_path / "b", base=str(base))
    assert gap(expected, mlx_logits(base, tmp_path / "b")) > 1e-2

    expected = tuned(base, tmp_path / "plain", "pissa_niter_4", convert=True)
    import_peft(tmp_path / "plain", tmp_path / "c", base=str(base))
    assert gap(expected, mlx_logits(base, tmp_path / "c")) < 1e-4


def test_the_layers_that_the_settings_name_are_those_of_peft(tiny: TinyModels) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    places, seen = sites(load(tiny("llama")).model), set()
    for settings in [*NAMED, *(change for change, _ in BEYOND)]:
        if settings["target_modules"] not in (None, "all-linear"):  # PEFT resolves these before
            config = peft.LoraConfig(**settings)
            for place in places:
                theirs = bool(check_target_module_exists(config, place.path))
                assert targeted(settings, place) is theirs, (settings, place.path)
                seen.add(theirs)
    assert seen == {True, False}


def test_peft_leaves_out_tensors_beyond_the_target_modules(base: Path, tmp_path: Path) -> None:
    """Which is why an import refuses them: with them it would be another model."""
    expected = tuned(base, tmp_path / "peft", True)
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    settings["target_modules"] = ["q_proj", "v_proj"]
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    loaded = peft.PeftModel.from_pretrained(in_torch(base), tmp_path / "peft")
    assert gap(expected, torch_logits(loaded)) > 1e-2
    with pytest.raises(SlimError, match="which PEFT ignores"):
        import_peft(tmp_path / "peft", tmp_path / "a", base=str(base))
