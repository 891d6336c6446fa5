"""A random model, its tokenizer and its rows: what a machine is tested with, without a download.

Invariant: the same numbers on every machine (weights and rows are drawn by NumPy from a seed), and
weights that bfloat16 holds exactly, so that a model loaded in bfloat16 and one in float32 are the
same function. The folder is that of a hub download: it goes through every loader. Try it:
``mlx-slim doctor --self-test``.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_slim.models.build import build
from mlx_slim.reading import ModelConfig

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Heads of 64 (for which Metal has fused attention), grouped queries, a head wider than the bytes.
CONFIG: ModelConfig = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_WORDS = ("the", "quick", "brown", "fox", "reads", "seven", "books", "about", "old", "ships")


def byte_tokenizer(folder: Path, *, chat_template: str | None = CHATML, bos: bool = False) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``: one token a byte, three specials."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single=f"{SPECIALS[1]} $A",
            special_tokens=[(SPECIALS[1], tokenizer.token_to_id(SPECIALS[1]))],
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: ModelConfig = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2] if chat_template else SPECIALS[0],
        "pad_token": SPECIALS[0],
        "model_max_length": 512,
    }
    if chat_template:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_small_model(folder: Path, *, seed: int = 0) -> Path:
    """Write the random model of ``CONFIG`` in Hugging Face format; return its folder."""
    byte_tokenizer(folder)
    rng = np.random.default_rng(seed)
    weights: dict[str, mx.array] = {}
    parameters: list[tuple[str, mx.array]] = tree_flatten(build(CONFIG).parameters())  # type: ignore[assignment]
    for path, value in sorted(parameters, key=lambda item: item[0]):
        drawn = mx.array(rng.standard_normal(value.shape, dtype=np.float32))
        # Norms near 1; projections that keep the scale of what goes through them.
        array = 1 + 0.1 * drawn if value.ndim == 1 else drawn * value.shape[-1] ** -0.5
        weights[path] = array.astype(mx.bfloat16).astype(mx.float32)
    mx.eval(weights)
    metadata = {"format": "pt"}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata=metadata)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    return folder


def write_rows(file: Path, count: int = 24) -> Path:
    """Write ``count`` rows of many lengths, 30 to 210 bytes each; return the file."""
    lines = []
    for number in range(count):
        words = [_WORDS[(number * 7 + i) % len(_WORDS)] for i in range(2 + number * 5 % 23)]
        row = {"prompt": f"{number}: {' '.join(words)}", "completion": " ".join(words[::-1][:12])}
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file
