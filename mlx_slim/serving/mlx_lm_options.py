"""What mlx-lm's server reads of its own command line, from the options of ``mlx-slim serve``.

Invariant: every value that mlx-lm would take from its command line is set here. Used by
``serving/generator.py``.
"""

from __future__ import annotations

from argparse import Namespace

from mlx_slim.evaluation.chat import PREFILL
from mlx_slim.models.kv_cache import QUANTIZED_PREFILL
from mlx_slim.serving.options import ServeOptions

MOST_ANSWERS = 32  # at a time
MOST_PROMPTS = 8
PROMPT_CACHES = 10


def server_arguments(options: ServeOptions) -> Namespace:
    """Return what mlx-lm's server reads of its command line."""
    return Namespace(
        model=None,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=options.num_draft_tokens,
        trust_remote_code=options.trust_remote_code,
        chat_template="",
        use_default_chat_template=False,
        chat_template_args={},
        allowed_origins=[],
        temp=options.temp,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        max_tokens=options.max_tokens,
        decode_concurrency=MOST_ANSWERS,
        prompt_concurrency=MOST_PROMPTS,
        prefill_step_size=PREFILL if options.kv_bits is None else QUANTIZED_PREFILL,
        prompt_cache_size=PROMPT_CACHES,
        prompt_cache_bytes=None,
        # Quantized caches are the model's own (``models/kv_cache.py``): nothing to do for mlx-lm.
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
        pipeline=False,
    )
