"""Targets of the fuzz tests that lie in folders of models, adapters and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.fuzz_run import Target

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_BASE = "base"  # the folder of a model inside an input, which stays as it is


def make_model(folder: Path) -> None:
    """Write a model with all files that a folder may have."""
    from tests.support.tiny import CHATML, tiny_model

    tiny_model(folder, **_SMALL)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 258], "top_p": 0.9}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 257}')
    (folder / "chat_template.jinja").write_text(CHATML)


def make_quantized(folder: Path) -> None:
    """Write a model in 4 bits, one layer of it in 8."""
    import mlx.nn as nn

    from mlx_slim.models.load import load
    from mlx_slim.models.save import save_model

    make_model(folder / "dense")
    loaded = load(folder / "dense")
    nn.quantize(
        loaded.model,
        32,
        4,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized")
            and ({"bits": 8, "group_size": 32} if path.endswith("v_proj") else True)
        ),
    )
    save_model(folder / "model", loaded.model, loaded.tokenizer, loaded.config)


def use_model(folder: Path, out: Path) -> None:
    """Load everything and compute a token, as ``generate`` does."""
    import mlx.core as mx

    from mlx_slim.models.load import load, read_config

    read_config(folder)
    loaded = load(folder)
    ids = loaded.tokenizer.encode("Hello")
    logits: Any = loaded.model(mx.array([[token % 256 for token in ids] or [0]]))  # type: ignore[operator]
    mx.eval(logits)


def use_quantized(folder: Path, out: Path) -> None:
    use_model(folder / "model", out)


def use_convert(folder: Path, out: Path) -> None:
    from mlx_slim.models.convert import convert

    convert(folder, out)


def use_tokenizer(folder: Path, out: Path) -> None:
    """Read and write a few tokens."""
    from mlx_slim.models.load import load_tokenizer

    tokenizer: Any = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("Hello <|im_end|>"))


# --------------------------------------------------------------------------------------- GGUF


def make_gguf(folder: Path) -> None:
    from tests.models.gguf.test_load import write_gguf
    from tests.support.tiny import tiny_model

    tiny_model(folder / _BASE, **{**_SMALL, "num_attention_heads": 4, "num_key_value_heads": 2})
    write_gguf(
        folder / "model.gguf",
        folder / _BASE,
        "llama",
        {"*": "Q8_0"},
        tokenizer__ggml__eot_token_id=258,
    )


def use_gguf(folder: Path, out: Path) -> None:
    from mlx_slim.models.gguf.load import import_gguf

    import_gguf(folder / "model.gguf").tokenizer.encode("Hello")


# ----------------------------------------------------------------------------------- adapters


def make_adapter(folder: Path) -> None:
    from mlx_slim.models.quantized import LayerFormat
    from mlx_slim.quantization.base import QuantizedBase, as_record
    from tests.support.adapters import write_adapter

    make_model(folder / _BASE)
    write_adapter(folder / "adapter", folder / _BASE)
    file = folder / "adapter" / "adapter_config.json"
    named = QuantizedBase(
        model=str(folder / _BASE),
        revision=None,
        quantize=LayerFormat(group_size=32, bits=4),
        dtype="float32",
        stored="float32",
    )
    config = json.loads(file.read_text()) | as_record(named, "../base")
    file.write_text(json.dumps(config))


def use_adapter(folder: Path, out: Path) -> None:
    from mlx_slim.adapters.stack import load_adapters, parse_adapters
    from mlx_slim.quantization.base import load_base

    stack = parse_adapters(str(folder / "adapter"))
    loaded = load_base(folder / _BASE, [one.folder for one in stack])
    load_adapters(loaded.model, stack)


def make_peft(folder: Path) -> None:
    from mlx_slim.adapters.peft import write_peft
    from mlx_slim.adapters.store import load_adapter
    from mlx_slim.models.load import load
    from tests.support.adapters import write_adapter

    make_model(folder / _BASE)
    write_adapter(folder / "mlx", folder / _BASE)
    loaded = load(folder / _BASE)
    injected = load_adapter(loaded.model, folder / "mlx")
    (folder / "peft").mkdir()
    write_peft(
        folder / "peft", loaded.model, injected, base="base", dropout=0.0, rslora=False, tied=False
    )
    file = folder / "peft" / "adapter_config.json"
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r".*\.v_proj": 8, "k_proj": 16}}
    file.write_text(json.dumps(json.loads(file.read_text()) | patterns))


def use_peft(folder: Path, out: Path) -> None:
    from mlx_slim.adapters.peft import place_peft
    from mlx_slim.adapters.peft_rules import read_folder
    from mlx_slim.models.load import load

    model = load(folder / _BASE).model
    place_peft(model, read_folder(folder / "peft", model))


# --------------------------------------------------------------------------------------- runs


def make_run(folder: Path) -> None:
    """Write a finished run with its checkpoints."""
    from mlx_slim.finetuning.run import finetune
    from tests.support.runs import Recorder, recipe, write_rows

    make_model(folder / _BASE)
    write_rows(folder / "rows.jsonl")
    resolved = recipe(folder / _BASE, folder / "rows.jsonl", steps=4)
    finetune(resolved, folder / "run", observer=Recorder())


def use_finished(folder: Path, out: Path) -> None:
    """Go on with a run that is complete: its records are read."""
    from mlx_slim.finetuning.run import _finished
    from mlx_slim.finetuning.run_dir import _check_same
    from tests.support.runs import Recorder, recipe

    run = folder / "run"
    valid = folder.parent.parent.parent / "valid" / "run"
    _check_same(run, recipe(valid / _BASE, valid / "rows.jsonl", steps=4).recipe)
    _finished(run, Recorder())


def use_checkpoint(folder: Path, out: Path) -> None:
    """Read a checkpoint, the metrics and the rows of a run."""
    from mlx_slim.artifacts import load_tensors, read_records
    from mlx_slim.events import Saved
    from mlx_slim.training.metrics import MetricsFile
    from mlx_slim.training.state import read_state

    run = folder / "run"
    read_state(run / "checkpoints" / "step-4")
    for name in ("weights", "optimizer"):
        load_tensors(run / "checkpoints" / "step-4" / f"{name}.safetensors")
    list(read_records(run / "metrics.jsonl"))
    MetricsFile(run / "metrics.jsonl").rewind(Saved(2, "checkpoints/step-2"))


TARGETS = [
    Target(
        "model",
        make_model,
        ("config.json",) * 4 + ("generation_config.json", "*.index.json", "model-*.safetensors"),
        use_model,
        lambda source, out: ["generate", str(source), "--prompt", "a", "--max-tokens", "2"],
        weight=5,
    ),
    Target(
        "quantized",
        make_quantized,
        ("model/config.json",) * 2 + ("model/*.safetensors",),
        use_quantized,
        lambda source, out: [
            "generate",
            str(source / "model"),
            "--prompt",
            "a",
            "--max-tokens",
            "2",
        ],
        weight=2,
    ),
    Target(
        "convert",
        make_model,
        ("*.json", "*.safetensors"),
        use_convert,
        lambda source, out: ["convert", str(source), "-o", str(out)],
    ),
    Target(
        "tokenizer",
        make_model,
        ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*.jinja"),
        use_tokenizer,
        lambda source, out: ["generate", str(source), "--prompt", "a", "--max-tokens", "2"],
        weight=3,
    ),
    Target(
        "gguf",
        make_gguf,
        ("model.gguf",),
        use_gguf,
        lambda source, out: ["convert", str(source / "model.gguf"), "-o", str(out)],
        weight=5,
    ),
    Target(
        "adapter",
        make_adapter,
        ("adapter/*.json", "adapter/*.safetensors"),
        use_adapter,
        lambda source, out: [
            "generate",
            str(source / _BASE),
            "--adapter",
            str(source / "adapter"),
            *("--prompt", "a", "--max-tokens", "2"),
        ],
        weight=3,
    ),
    Target(
        "peft",
        make_peft,
        ("peft/*.json", "peft/*.safetensors"),
        use_peft,
        lambda source, out: [
            "import",
            str(source / "peft"),
            "--model",
            str(source / _BASE),
            "-o",
            str(out),
        ],
        weight=3,
    ),
    Target(
        "run",
        make_run,
        ("run/run.json", "run/recipe.json", "run/data_ledger.json"),
        use_finished,
    ),
    Target(
        "checkpoint",
        make_run,
        ("run/checkpoints/step-4/*", "run/metrics.jsonl"),
        use_checkpoint,
    ),
]
