"""Keys and values of prompts that were answered, for requests that begin alike.

Invariant: a kept cache holds exactly the tokens of its key. Used by ``serving/generator.py``.
"""

from __future__ import annotations

from typing import Any

from mlx_lm.models.cache import LRUPromptCache


class PromptCache(LRUPromptCache):
    """Prompt caches by their tokens, the last of which is always computed anew.

    mlx-lm's speculative decoding leaves the model's cache and the draft's behind the tokens by
    different numbers; here all are cut to the shortest, and the key with them.
    """

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """Return a copy of the cache of the longest prefix, and the tokens after it."""
        if len(tokens) < 2:
            return None, tokens
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return (None, tokens) if cache is None else (cache, [*rest, tokens[-1]])

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keep a cache, if it can be cut to the tokens that are in all of its layers."""
        offsets = [getattr(cache, "offset", None) for cache in prompt_cache]
        lengths = [n for n in offsets if isinstance(n, int)]
        length = min([*lengths, len(tokens)])
        if length < len(tokens) and len(lengths) < len(offsets):
            return  # a state that is not keys and values stands behind all tokens
        for cache, offset in zip(prompt_cache, offsets, strict=True):
            cut = offset - length if isinstance(offset, int) else 0
            if cut and (not cache.is_trimmable() or cache.trim(cut) != cut):
                return
        if length:
            super().insert_cache(model, tokens[:length], prompt_cache, cache_type=cache_type)
