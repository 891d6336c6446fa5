"""A configuration file of ``mlx_lm.lora``: its keys, their defaults, and where they stand.

Invariant: defaults and keys are those of mlx-lm 0.32 (``mlx_lm/lora.py``); a key that it does not
have is refused, with the name that it has now if an older one had it. Used by
``mlx_lm_config.py``; try it: ``mlx-slim recipes --from-mlx-lm lora_config.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_slim.config.problems import Keys
from mlx_slim.config.read import read_mapping
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.reading import JsonObject, short, shown

DEFAULTS: JsonObject = {
    "model": "Qwen/Qwen3-0.6b",
    "train": False,
    "fine_tune_type": "lora",
    "optimizer": "adam",
    "optimizer_config": {},
    "data": "mlx-community/WikiSQL",
    "hf_dataset": None,
    "prompt_feature": None,
    "completion_feature": None,
    "text_feature": None,
    "chat_feature": None,
    "seed": 0,
    "num_layers": 16,
    "batch_size": 4,
    "iters": 1000,
    "val_batches": 25,
    "learning_rate": 1e-5,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "resume_adapter_file": None,
    "adapter_path": "adapters",
    "save_every": 100,
    "test": False,
    "test_batches": 500,
    "max_seq_length": 2048,
    "config": None,
    "grad_checkpoint": False,
    "grad_accumulation_steps": 1,
    "clear_cache_threshold": 0,
    "lr_schedule": None,
    "lora_parameters": {},
    "mask_prompt": False,
    "report_to": None,
    "project_name": None,
    "trust_remote_code": False,
}
LORA: JsonObject = {"rank": 8, "dropout": 0.0, "scale": 20.0, "keys": None}
SCHEDULE: JsonObject = {"name": None, "arguments": None, "warmup": 0, "warmup_init": 0.0}
SOURCE = (
    *("path", "config", "train_split", "valid_split", "test_split"),
    *("prompt_feature", "completion_feature", "text_feature", "chat_feature"),
)
# Of mlx-lm before 0.20 -> what stands for it.
RENAMED = {
    "lora_layers": "mlx-lm calls it num_layers now",
    "use_dora": "mlx-lm has fine_tune_type: dora instead",
}


@dataclass(frozen=True)
class ConfigFile:
    """The keys of a file with mlx-lm's defaults; errors name file and line."""

    path: Path
    values: JsonObject
    lines: dict[Keys, int]

    def place(self, *keys: str) -> str:
        """Return file and line of a key."""
        line = self.lines.get(keys)
        return f"{short(self.path)}, line {line}" if line else short(self.path)

    def error(self, keys: Keys, expected: str, hint: str = "") -> SlimError:
        """Return the refusal of a value."""
        value: Any = self.values
        for key in keys:
            value = value.get(key)
        text = f"{self.place(*keys)}: {'.'.join(keys)} is {shown(value)}, expected {expected}"
        return SlimError(text, hint)

    def whole(self, key: str, least: int = 1) -> int:
        """Return a whole number of at least ``least``."""
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error((key,), f"a whole number from {least}")
        return value

    def inner(self, key: str, defaults: JsonObject) -> JsonObject:
        """Return a mapping under ``key`` with defaults; unknown keys are refused."""
        value = self.values[key] or {}
        if not isinstance(value, dict):
            raise self.error((key,), "`key: value` lines")
        for name in value:
            if name not in defaults:
                hint = did_you_mean(name, defaults)
                if (key, name) == ("lora_parameters", "alpha"):
                    hint = "mlx-lm has scale instead: alpha / rank"
                where = self.place(key, name)
                raise SlimError(f"{where}: {key}.{name} is not a key of mlx_lm.lora", hint)
        return {**defaults, **value}


def read_file(path: Path) -> ConfigFile:
    """Return the keys of a file, with mlx-lm's defaults for those that it leaves out.

    Raises:
        SlimError: If it cannot be read, or has a key that mlx-lm does not have.
    """
    content, lines = read_mapping(path)
    for key in content:
        if key not in DEFAULTS:
            raise SlimError(
                f"{short(path)}, line {lines[(key,)]}: {key} is not a key of mlx_lm.lora",
                RENAMED.get(key) or did_you_mean(key, DEFAULTS),
            )
    values = {
        key: content[key] if content.get(key) is not None else default
        for key, default in DEFAULTS.items()
    }
    return ConfigFile(path, values, lines)
