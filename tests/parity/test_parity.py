"""The same logits as the real transformers and peft on PyTorch, to 1e-4, both ways.

Needs PyTorch; skipped without it. Run: ``make parity``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.export.model import export_hf
from mlx_slim.export.peft import export_peft, import_peft
from mlx_slim.models.hf import CLASSES
from mlx_slim.models.load import load
from tests.parity.torch_side import (
    TINY,
    gap,
    in_torch,
    mlx_logits,
    peft,
    torch,
    torch_logits,
    transformers,
)
from tests.support.adapters import write_adapter, write_quantized
from tests.support.tiny import TinyModels, byte_tokenizer


@pytest.fixture(scope="module")
def base(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function: architecture -> a tiny model in Hugging Face's format."""
    folders: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in folders:
            folder = tmp_path_factory.mktemp("hf") / architecture
            export_hf(tiny(architecture), folder)
            folders[architecture] = folder
        return folders[architecture]

    return get


EVERY = ["q_proj", "k_proj", "v_proj"]
TO_PEFT = [
    ("llama", {}, False),
    ("llama", {"scaling": "rslora", "alpha": 8}, False),
    ("llama", {}, True),
    ("phi", {"targets": [*EVERY, "dense", "fc1", "fc2"]}, True),
    ("llama", {"targets": ["all-linear", "embed_tokens", "lm_head"]}, False),
    ("mistral", {"init": "pissa"}, False),
    ("llama-tied", {"targets": ["q_proj", "down_proj"], "layers": [0, 2]}, False),
    ("llama", {"modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}, False),
    ("llama-tied", {"modules_to_save": ["embed_tokens", "input_layernorm"]}, True),
]


@pytest.mark.parametrize(("architecture", "settings", "dora"), TO_PEFT)
def test_an_exported_adapter_answers_alike_in_peft(
    base: Callable[[str], Path],
    tmp_path: Path,
    architecture: str,
    settings: dict[str, Any],
    dora: bool,
) -> None:
    folder = base(architecture)
    adapter = write_adapter(tmp_path / "a", folder, dora=dora, **settings)
    export_peft(adapter, tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(in_torch(folder), tmp_path / "peft")
    plain = mlx_logits(folder)
    assert gap(mlx_logits(folder, adapter), torch_logits(model)) < 1e-4
    assert gap(plain, torch_logits(model)) > 1e-2


FROM_PEFT = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": EVERY, "use_rslora": True, "lora_alpha": 6}),
    ("llama", {"target_modules": [*EVERY, "gate_proj"], "use_dora": True}),
    ("phi", {"target_modules": [*EVERY, "fc1"], "use_dora": True, "use_rslora": True}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    (
        "mistral",
        {
            "target_modules": EVERY,
            "rank_pattern": {"v_proj": 7},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
        },
    ),
    ("qwen2", {"target_modules": EVERY, "layers_to_transform": [1]}),
    ("llama", {"target_modules": EVERY, "rank_pattern": {"k_proj": 2}, "use_dora": True}),
    ("llama", {"target_modules": EVERY, "modules_to_save": ["norm", "lm_head"]}),
    (
        "llama-tied",
        {"target_modules": EVERY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
]


@pytest.mark.parametrize(("architecture", "settings"), FROM_PEFT)
def test_an_adapter_of_peft_answers_alike_here(
    base: Callable[[str], Path], tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    folder = base(architecture)
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 16, **settings})
    model = peft.get_peft_model(in_torch(folder), config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    expected = torch_logits(model)
    model.save_pretrained(tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "a", base=str(folder))
    assert gap(expected, mlx_logits(folder, tmp_path / "a")) < 1e-4
    assert gap(expected, mlx_logits(folder)) > 1e-2
    export_peft(tmp_path / "a", tmp_path / "again")
    again = peft.PeftModel.from_pretrained(in_torch(folder), tmp_path / "again")
    assert gap(expected, torch_logits(again)) < 1e-4


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "mistral", "phi", "qwen2"])
def test_exported_models_load_in_transformers(
    tiny: TinyModels, tmp_path: Path, architecture: str, bits: int | None
) -> None:
    source = tiny(architecture)
    source = write_quantized(tmp_path / "q", source, bits) if bits else source
    export_hf(source, tmp_path / "hf")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == CLASSES[model.config.model_type]
    assert gap(mlx_logits(source), torch_logits(model)) < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode("Hé <|im_end|>") == load(source).tokenizer.encode("Hé <|im_end|>")


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_every_architecture_keeps_names_and_values(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY)
    if hasattr(config, "head_dim"):
        config.head_dim = 16
    if hasattr(config, "rope_parameters") and isinstance(config.rope_parameters, dict):
        config.rope_parameters["rope_theta"] = 50000.0
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer(tmp_path / "source")
    export_hf(tmp_path / "source", tmp_path / "hf")
    again = in_torch(tmp_path / "hf")
    expected = model.state_dict()
    actual = again.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert gap(torch_logits(model), torch_logits(again)) < 1e-5
    assert gap(torch_logits(model), mlx_logits(tmp_path / "hf")) < 1e-4


def test_a_fused_model_is_what_peft_merges(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = base("llama")
    adapter = write_adapter(tmp_path / "a", folder, dora=True)
    fuse(folder, adapter, tmp_path / "fused", FuseOptions(samples=1, length=32))
    export_peft(adapter, tmp_path / "peft")
    merged = peft.PeftModel.from_pretrained(in_torch(folder), tmp_path / "peft").merge_and_unload()
    assert gap(torch_logits(merged), mlx_logits(tmp_path / "fused")) < 1e-4
    weights = in_torch(tmp_path / "fused").state_dict()
    for name, value in merged.state_dict().items():
        assert torch.allclose(value, weights[name], atol=1e-5), name
