"""Adapters of PEFT: every start by PEFT's own rules, refused where its base cannot be computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.adapters import peft, peft_rules
from mlx_slim.adapters.store import load_adapter
from mlx_slim.cli.main import run
from mlx_slim.errors import SlimError
from mlx_slim.export.peft import export_peft, import_peft
from mlx_slim.models.load import load
from mlx_slim.models.save import save_model
from mlx_slim.runtime import to_float
from tests.adapters.support import IDS
from tests.support.adapters import tuned_logits, write_adapter, write_quantized


def peft_settings(folder: Path, **change: Any) -> None:
    """Change the settings of a PEFT folder."""
    settings = json.loads((folder / peft_rules.CONFIG).read_text())
    (folder / peft_rules.CONFIG).write_text(json.dumps({**settings, **change}))


CHANGED = ["pissa_niter_16", "corda", "lora_ga", "loftq"]


@pytest.mark.parametrize("start", [*CHANGED, "of-a-later-peft", 3, ["pissa"]])
def test_a_start_that_changed_the_base_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, start: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    export_peft(write_adapter(tmp_path / "a", tiny("llama")), tmp_path / "p")
    peft_settings(tmp_path / "p", init_lora_weights=start)
    assert run(["import", str(tmp_path / "p"), "-o", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.count("error:") == 1 and f"init_lora_weights is {start!r}" in error
    assert ("gives wrong results" in error) is (start in CHANGED)
    assert ("path_initial_model" in error) is (start in CHANGED[:3])
    assert "merge_and_unload" in error and not (tmp_path / "out").exists()


def test_a_start_that_left_the_base_is_plain_lora(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    expected = tuned_logits(tiny("llama"), write_adapter(tmp_path / "a", tiny("llama")))
    export_peft(tmp_path / "a", tmp_path / "p")
    for number, start in enumerate([False, None, "gaussian", "eva", "mica", "orthogonal"]):
        peft_settings(tmp_path / "p", init_lora_weights=start)
        import_peft(tmp_path / "p", tmp_path / f"out{number}")
        assert mx.allclose(tuned_logits(tiny("llama"), tmp_path / f"out{number}"), expected)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_can_be_computed_again_stands_on_the_original_base(
    tiny: Callable[..., Path], tmp_path: Path, start: str
) -> None:
    base = tiny("llama")
    adapter = write_adapter(tmp_path / "a", base, targets=["q_proj", "up_proj"], rank=4, alpha=6)
    export_peft(adapter, tmp_path / "p")
    peft_settings(tmp_path / "p", init_lora_weights=start)
    done = import_peft(tmp_path / "p", tmp_path / "back")
    assert any("twice the rank" in line for line in done.lines())
    model = load(base).model  # what PEFT computes: the changed base, and the adapter on it
    for _, module in model.named_modules():
        for name in {"q_proj", "up_proj"} & set(module):
            weight = np.array(module[name].weight, dtype=np.float64)
            if start == "pissa":
                u, sigma, vt = np.linalg.svd(weight, full_matrices=False)
                rest = (u[:, 4:] * sigma[4:]) @ vt[4:]
            else:
                q, r = np.linalg.qr(weight)
                rest = weight - 1.5 * q[:, :4] @ r[:4]
            module[name].weight = mx.array(rest, dtype=mx.float32)
    load_adapter(model, adapter_on_any_base(adapter))
    model.eval()
    expected, logits = model(IDS), tuned_logits(base, tmp_path / "back")
    assert to_float(mx.abs(logits - expected).max() / mx.abs(expected).max()) < 1e-4
    assert to_float(mx.abs(tuned_logits(base, adapter) - expected).max()) > 1e-2

    small = write_quantized(tmp_path / "q", base)
    with pytest.raises(SlimError, match="q_proj is quantized here") as caught:
        import_peft(tmp_path / "p", tmp_path / "out", base=str(small))
    assert "--model" in caught.value.hint and not (tmp_path / "out").exists()


def adapter_on_any_base(adapter: Path) -> Path:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config.pop("base_sample")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


def test_a_base_that_does_not_determine_a_start_is_refused(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(tiny("llama"))
    for _, module in model.model.named_modules():
        if "q_proj" in module:
            module.q_proj.weight = mx.eye(64)
    save_model(tmp_path / "even", model.model, model.tokenizer, model.config)
    export_peft(
        write_adapter(tmp_path / "a", tmp_path / "even", targets=["q_proj"]), tmp_path / "p"
    )
    peft_settings(tmp_path / "p", init_lora_weights="pissa")
    with pytest.raises(SlimError, match="singular values around rank 4 are too close"):
        import_peft(tmp_path / "p", tmp_path / "out")


@pytest.mark.parametrize("dora", [False, True])
def test_the_check_is_peft_s_formula_and_not_our_reading(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dora: bool
) -> None:
    adapter = write_adapter(tmp_path / "a", tiny("llama"), dora=dora, size=1e-3)
    export_peft(adapter, tmp_path / "p")
    right = peft._factors

    def wrong(layer: Any, scale: Any):
        a_IR, b_RO = right(layer, scale)
        return a_IR, 1.01 * b_RO

    monkeypatch.setattr(peft, "_factors", wrong)
    with pytest.raises(SlimError, match="other logits than PEFT"):
        import_peft(tmp_path / "p", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": 8}, "q_proj: A is (4, 64), expected (8, 64)"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj: A is (4, 64), expected (2, 64)"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '(' is not a valid regular expression"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern['q_proj'] is None"),
        ({"alpha_pattern": [4]}, "alpha_pattern is [4], expected an object"),
    ],
)
def test_ranks_and_alphas_are_those_that_the_settings_say(
    tiny: Callable[..., Path], tmp_path: Path, change: Any, says: str
) -> None:
    export_peft(write_adapter(tmp_path / "a", tiny("llama"), targets=["q_proj"]), tmp_path / "p")
    peft_settings(tmp_path / "p", **change)
    with pytest.raises(SlimError) as caught:
        import_peft(tmp_path / "p", tmp_path / "out")
    assert says in caught.value.message


NAMED = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.self_attn\.(q|v)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": None},
    {"target_modules": ["v_proj", "q_proj", "up_proj"], "exclude_modules": ["up_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1, 2]},
]
BEYOND = [
    ({"target_modules": ["q_proj"]}, "layers.0.self_attn.v_proj"),
    ({"target_modules": ["proj"]}, "layers.0.self_attn.q_proj"),
    ({"target_modules": r".*\.q_proj"}, "layers.0.self_attn.v_proj"),
    ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": "model.*v_proj"}, "v_proj"),
    ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}, "layers.0.self_attn"),
    (
        {
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": [0, 1],
            "layers_pattern": "h",
        },
        "layers.0.self_attn",
    ),
]


def test_tensors_beyond_the_target_modules_are_refused_as_peft_leaves_them_out(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """``make parity`` holds the same settings against PEFT."""
    export_peft(
        write_adapter(tmp_path / "a", tiny("llama"), targets=["q_proj", "v_proj"]), tmp_path / "p"
    )
    model = load(tiny("llama")).model
    for change in NAMED:
        peft_settings(tmp_path / "p", **change)
        assert len(peft_rules.read_folder(tmp_path / "p", model).layers) == 6
        peft_settings(tmp_path / "p", exclude_modules=None, layers_to_transform=None)
    for change, layer in BEYOND:
        peft_settings(tmp_path / "p", **change)
        with pytest.raises(SlimError, match="which PEFT ignores") as caught:
            import_peft(tmp_path / "p", tmp_path / "out")
        assert layer in caught.value.message and not (tmp_path / "out").exists()
        assert f"target_modules {change['target_modules']!r}" in caught.value.message
        peft_settings(tmp_path / "p", exclude_modules=None, layers_to_transform=None)
