"""llama.cpp, and what it computes of the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.parity.optional import needed
from tests.support.tiny import VOCAB

xllamacpp = needed("xllamacpp")

IDS = [1, 5, 9, 70, 200, 31, 8, 8, 2, 100, 44, 3]
# Sampled, whatever the logits are: half a character would be withheld, and they with it.
LETTER = 40


def log_probabilities(model: Path, ids: list[int], adapter: Path | None = None) -> np.ndarray:
    """Return llama.cpp's log-probabilities (V,) of the token after ``ids``, its cache in F32."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(model), 256, 1
    params.warmup, params.verbosity = False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    answer: Any = xllamacpp.Server(params).handle_completions(
        {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": VOCAB,
            "logit_bias": [[LETTER, 1000.0]],
            "cache_prompt": False,
        }
    )
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    logprobs_V = np.full(VOCAB, np.nan)
    for entry in top:
        logprobs_V[entry["id"]] = entry["logprob"]
    assert not np.isnan(logprobs_V).any()
    return logprobs_V
