r"""Rotary position embeddings with the frequencies and the scale that transformers computes.

Invariant: the angles of every type of ``TYPES`` are those of transformers
(``modeling_rope_utils.py``), at every length, or the parameters are refused. Rotation is
``mx.fast.rope``, one kernel on Metal. ``rope_install.py`` puts these modules into a model.
Try it: ``python -m pytest tests/models/test_rope.py``.

Position p turns the pair (x_i, x_{i + dims/2}) by the angle p / freqs_i; both are multiplied by
``scale`` (the attention factor), as transformers multiplies cos and sin. Types: ``linear``,
``yarn`` (arXiv 2309.00071), ``llama3``, ``longrope`` (arXiv 2402.13753) and ``dynamic`` (NTK); the
last two depend on the length of the sequence.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject

TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3")
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_LISTS = {"short_factor", "long_factor"}
_ZERO_IS_NONE = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}  # as transformers reads them
_NUMBERS = {
    "attention_factor",
    "factor",
    "high_freq_factor",
    "long_mscale",
    "low_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
    "short_mscale",
    *_LISTS,
    *_ZERO_IS_NONE,
}


class ScaledRoPE(nn.Module):
    """A rotary embedding whose frequencies do not depend on the length.

    Args:
        dims: Leading features of a head that are rotated; even.
        freqs: Positions a turn of one radian, (dims / 2,).
        scale: Factor of the rotated features (the attention factor).
        traditional: Pairs are neighbours (x_0, x_1) instead of halves (x_0, x_{dims/2}).
    """

    def __init__(
        self, dims: int, freqs: np.ndarray, *, scale: float = 1.0, traditional: bool = False
    ) -> None:
        super().__init__()
        self.dims, self.scale, self.traditional = dims, scale, traditional
        self._freqs = mx.array(freqs.astype(np.float32))

    def _extra_repr(self) -> str:
        return f"{self.dims}, scale={self.scale:g}, traditional={self.traditional}"

    def frequencies(self, length: int | mx.array) -> mx.array:
        """Return the positions a radian (dims / 2,) for a sequence of ``length`` tokens."""
        return self._freqs

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate ``x`` (B, heads, T, features) from position ``offset`` on: one, or (B,)."""
        freqs = self.frequencies(_end(offset) + x.shape[-2])
        if self.scale != 1.0:  # in float32: rounded to bfloat16 the factor itself is 0.2% off
            x = (x.astype(mx.float32) * self._factors(x.shape[-1])).astype(x.dtype)
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=freqs,
        )

    def _factors(self, features: int) -> mx.array:
        """Return the factor of each feature: those that are not rotated are not scaled."""
        if features == self.dims:
            return mx.array(self.scale)
        return mx.where(mx.arange(features) < self.dims, self.scale, 1.0)


def _end(offset: int | mx.array) -> int | mx.array:
    return offset.max() if isinstance(offset, mx.array) and offset.ndim else offset


class LengthRoPE(ScaledRoPE):
    """A rotary embedding that turns differently once the sequence is longer than ``boundary``.

    transformers looks at the last position of what it computes; so does this, unless ``length``
    has the length of the whole sequence that is computed in segments (``set_length``).

    Args:
        dims: As ``ScaledRoPE``.
        freqs: Up to ``boundary``.
        boundary: Tokens.
        scale: As ``ScaledRoPE``.
        traditional: As ``ScaledRoPE``.
        beyond: Frequencies of longer sequences; None for dynamic NTK.
        ntk: (theta, factor) of dynamic NTK.
    """

    def __init__(
        self,
        dims: int,
        freqs: np.ndarray,
        boundary: int,
        *,
        scale: float = 1.0,
        traditional: bool = False,
        beyond: np.ndarray | None = None,
        ntk: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(dims, freqs, scale=scale, traditional=traditional)
        self.boundary, self.ntk = boundary, ntk
        self.length: int | None = None
        self._beyond = None if beyond is None else mx.array(beyond.astype(np.float32))

    def frequencies(self, length: int | mx.array) -> mx.array:
        """Return the positions a radian (dims / 2,) for a sequence of ``length`` tokens."""
        length = length if self.length is None else self.length
        if isinstance(length, int):
            return self._freqs if length <= self.boundary else self._longer(length)
        return mx.where(length > self.boundary, self._longer(length), self._freqs)

    def alike(self, one: int, other: int) -> bool:
        """Return whether sequences of both lengths are rotated by the same angles."""
        short = one <= self.boundary
        return short == (other <= self.boundary) and (short or one == other or self.ntk is None)

    def _longer(self, length: int | mx.array) -> mx.array:
        if self._beyond is not None:
            return self._beyond
        assert self.ntk is not None
        theta, factor = self.ntk
        exponents = mx.arange(0, self.dims, 2, dtype=mx.float32) / self.dims
        stretch = factor * length / self.boundary - (factor - 1)
        base = theta * stretch ** (self.dims / (self.dims - 2))
        return base**exponents


def set_length(model: nn.Module, length: int | None) -> bool:
    """Set the length of the sequences that ``model`` will compute in segments, or padded.

    Args:
        model: Any model; nothing happens where its RoPE does not depend on the length.
        length: Tokens; None looks at each call's last position again.

    Returns:
        Whether keys that were computed under the length set before are those of this length.
    """
    same = True
    for module in model.modules():
        if isinstance(module, LengthRoPE):
            before = module.length
            same &= before == length or (
                before is not None and length is not None and module.alike(before, length)
            )
            module.length = length
    return same


def boundary_of(model: nn.Module, *, dynamic_only: bool = False) -> int | None:
    """Return the longest sequence (tokens) before the RoPE of ``model`` changes; None: never.

    Args:
        model: Any model.
        dynamic_only: Count only what changes with every further token (dynamic NTK).
    """
    embeddings = [m for m in model.modules() if isinstance(m, LengthRoPE)]
    return min((m.boundary for m in embeddings if m.ntk or not dynamic_only), default=None)


# ------------------------------------------------------------------------------ frequencies


def make_rope(
    rope: JsonObject, dims: int, *, positions: int | None, traditional: bool = False
) -> ScaledRoPE:
    """Return the rotary embedding of ``rope``.

    Args:
        rope: ``rope_parameters`` of transformers: ``rope_type`` of ``TYPES``, ``rope_theta``, ….
        dims: Rotated features of a head.
        positions: ``max_position_embeddings`` of the model, tokens.
        traditional: As ``ScaledRoPE``.

    Raises:
        SlimError: If a value is missing or cannot be.
    """
    check_values(rope)
    kind, theta = rope["rope_type"], float(rope.get("rope_theta") or 10000.0)
    plain = theta ** (np.arange(0, dims, 2) / dims)
    try:
        if kind == "linear":
            return ScaledRoPE(dims, plain * float(rope["factor"]), traditional=traditional)
        if kind == "dynamic":
            if not positions:
                raise _bad(kind, "needs max_position_embeddings")
            ntk = (theta, float(rope["factor"]))
            return LengthRoPE(dims, plain, positions, traditional=traditional, ntk=ntk)
        original = int(rope.get("original_max_position_embeddings") or positions or 0)
        if original < 1:
            raise _bad(kind, "needs original_max_position_embeddings")
        if kind == "llama3":
            return ScaledRoPE(dims, _llama3(rope, plain, original), traditional=traditional)
        factor = rope.get("factor")
        if factor is None:
            if not positions:
                raise _bad(kind, "has no factor, and the config no max_position_embeddings")
            factor = positions / original
        factor = float(factor)
        if kind == "yarn":
            freqs = _yarn(rope, dims, theta, factor, original)
            return ScaledRoPE(dims, freqs, scale=_yarn_scale(rope, factor), traditional=traditional)
        return _longrope(rope, plain, dims, factor, original, traditional)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise _bad(kind, f"has a value that cannot be used: {error}") from error


def check_values(rope: JsonObject) -> None:
    """Refuse parameters of a type of ``TYPES`` that are missing or no numbers above 0.

    Raises:
        SlimError: With the first of them.
    """
    kind = rope["rope_type"]
    if lacking := [key for key in _REQUIRED[kind] if rope.get(key) is None]:
        raise _bad(kind, f"has no {' and no '.join(lacking)}")
    for key in sorted(_NUMBERS & rope.keys()):
        value = rope[key]
        if value is None or (value == 0 and key in _ZERO_IS_NONE):
            continue
        numbers = value if isinstance(value, list) and key in _LISTS else [value]
        if not all(is_positive(number) for number in numbers):
            raise _bad(kind, f"has {key}={value!r}, expected numbers above 0")
    original = rope.get("original_max_position_embeddings")
    if original is not None and original != int(original):
        raise _bad(kind, f"has original_max_position_embeddings={original}, expected whole tokens")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise _bad(kind, "has a low_freq_factor that is not below its high_freq_factor")


def is_positive(value: Any) -> bool:
    """Return whether ``value`` is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf


def _bad(kind: str, what: str) -> SlimError:
    return SlimError(f"config.json: RoPE type {kind!r} {what}", "use the original model's config")


def _llama3(rope: JsonObject, plain: np.ndarray, original: int) -> np.ndarray:
    factor = float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = original / (2 * math.pi * plain)  # of each pair over the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1 - smooth) / (plain * factor) + smooth / plain)


def _yarn(rope: JsonObject, dims: int, theta: float, factor: float, original: int) -> np.ndarray:
    def pair(turns: float) -> float:
        """Return the pair that makes so many turns over the original context."""
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(dims // 2) - low) / (high - low), 0.0, 1.0)
    plain = theta ** (np.arange(0, dims, 2) / dims)
    return 1.0 / (ramp / (factor * plain) + (1 - ramp) / plain)


def _yarn_scale(rope: JsonObject, factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    return mscale(over) / mscale(under) if over and under else mscale(1.0)


def _longrope(
    rope: JsonObject,
    plain: np.ndarray,
    dims: int,
    factor: float,
    original: int,
    traditional: bool,
) -> ScaledRoPE:
    stretched = []
    for key in ("short_factor", "long_factor"):
        values = np.asarray(rope[key], dtype=np.float64)
        if values.shape != (dims // 2,):
            raise _bad("longrope", f"has {values.size} values in {key}, expected {dims // 2}")
        stretched.append(values * plain)
    scale = rope.get("attention_factor")
    if rope.get("short_mscale") is not None:  # Phi-3.5-MoE names the factor of each side
        scale = rope["short_mscale"]
        if rope.get("long_mscale", scale) != scale:
            raise _bad("longrope", "has a short_mscale that differs from its long_mscale")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = stretched
    if np.array_equal(short, long):
        return ScaledRoPE(dims, short, scale=float(scale), traditional=traditional)
    return LengthRoPE(
        dims, short, original, scale=float(scale), traditional=traditional, beyond=long
    )
