"""Where a model keeps its blocks, its body and its head: the only file that knows attribute names.

Invariant: a split into body and head is used only after ``head(body(x))`` was compared with
``model(x)`` on real tokens. A scale of the logits or of the width belongs to the body (the head is
linear), a soft cap to the head, so neither is lost and neither forces full logits; models that
still do not split are trained through these. Legend: B rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.errors import SlimError
from mlx_slim.models.kinds import HEADS, MLP
from mlx_slim.models.logits_close import Change, logits_close

_Map = Callable[[mx.array], mx.array]
_Body = Callable[..., mx.array]
HEAD_NAMES = ("lm_head", "output", "head", "embed_out")
EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embedding")
EMBEDDINGS += ("token_embeddings", "embeddings")
_WRAPPERS = ("language_model", "text_model")
_BODIES = ("model", "transformer", "backbone", "gpt_neox")
# Settings -> by what the logits of the classes that have them are scaled.
_SCALES: dict[tuple[str, ...], Callable[..., float]] = {
    ("logit_scale",): lambda scale: scale,
    ("output_multiplier",): lambda scale: scale,
    ("logits_scaling",): lambda divisor: 1 / divisor,
    ("mup_width_multiplier",): lambda divisor: 1 / divisor,
    ("dim_model_base", "hidden_size"): lambda base, width: base / width,
    ("lm_head_multiplier", "embedding_multiplier"): lambda head, embedding: head / embedding,
}
_CAP = "final_logit_softcapping"
_FIXED_CAP = 15.0  # nanochat: a constant of its code
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
_LINEAR_TYPES = (nn.Linear, nn.QuantizedLinear)
_PACKAGES = ("mlx", "mlx_slim")  # packages whose linear layers return W x + b
_ATTENTION, _QUERIES, _KEYS = "self_attn", "q_proj", ("k_proj", "v_proj")
_OUTPUTS = ("o_proj", "dense")
_HEAD_COUNTS = ("n_heads", "num_heads", "num_attention_heads")
_KV_COUNTS = ("n_kv_heads", "num_kv_heads", "num_key_value_heads")
_FEED_FORWARD = "mlp"
_MLP_LAYERS = (GATED_MLP, ("fc1", "fc2"))  # the last one reads what the others write
# Of the layers of a block, those that lose most in few bits (values, and what leaves the MLP) and
# those that lose least (what only decides where attention looks).
SENSITIVE = (_KEYS[1], *(names[-1] for names in _MLP_LAYERS))
ROBUST = (_QUERIES, _KEYS[0])
# Layers that read heads or neurons: ranks that divide a block divide their columns.
READERS = (*_OUTPUTS, *(names[-1] for names in _MLP_LAYERS))


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits.

    Attributes:
        module: A linear layer, or the embedding that a tied model uses as one.
        tied: Whether ``module`` is the embedding.
        cap: Soft cap c of the logits, c · tanh(z / c); None is none.
    """

    module: nn.Module
    tied: bool
    cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """V, the number of logits."""
        layer = self.module
        while "weight" not in layer:  # an adapter around the layer
            layer = layer["linear"] if "linear" in layer else layer["embedding"]
        return layer["weight"].shape[0]

    def __call__(self, hidden: mx.array) -> mx.array:
        """Return logits (..., V) of hidden states (..., D), float32 where they are capped."""
        apply = cast(_Map, self.module.as_linear if self.tied else self.module)
        linear = apply(hidden)
        return linear if self.cap is None else self.finish(linear.astype(mx.float32))

    def finish(self, linear: mx.array) -> mx.array:
        """Return the logits of what the linear map gave: c · tanh(z / c) where they are capped."""
        return linear if self.cap is None else mx.tanh(linear / self.cap) * self.cap

    def cap_derivative(self, logits: mx.array) -> mx.array | None:
        """Return ∂logit/∂z of ``finish`` at each finished logit: 1 − (logit / c)²; None is ones."""
        return None if self.cap is None else 1 - mx.square(logits / self.cap)


@dataclass(frozen=True)
class Split:
    """A model as body and head.

    Attributes:
        body: tokens_BT, cache= -> hidden_BTD, after the last norm and the scale of the logits.
        head: hidden -> logits.
    """

    body: _Body
    head: Head


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, first to last.

    Raises:
        SlimError: If the model does not expose them.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list) or not layers:
        raise SlimError(
            f"{type(model).__module__} has no list of blocks called 'layers'",
            "this architecture is not supported for training",
        )
    return layers


def blocks_path(model: nn.Module) -> str:
    """Return the parameter path of the list of blocks, such as ``model.layers``."""
    first = blocks(model)[0]
    for path, module in model.named_modules():
        if module is first:
            return path.rsplit(".", 1)[0]
    raise SlimError(f"{type(model).__module__} hides its blocks from named_modules")


def block_numbers(model: nn.Module, paths: Iterable[str]) -> dict[str, int]:
    """Return path -> number of its block, counted from 0, of the layers inside of blocks."""
    inside = re.compile(re.escape(blocks_path(model)) + r"\.(\d+)\.")
    matches = {path: inside.match(path) for path in paths}
    return {path: int(match[1]) for path, match in matches.items() if match}


def _candidates(model: nn.Module) -> list[Split]:
    """Return the ways ``model`` might split, without scale or cap; a probe decides."""
    pairs: list[Split] = []
    outer = next((model[name] for name in _WRAPPERS if name in model), model)
    for name in _BODIES:
        if name not in outer:
            continue
        body = outer[name]
        for owner in (outer, body):
            pairs += [
                Split(body, Head(owner[key], tied=False)) for key in HEAD_NAMES if key in owner
            ]
        pairs += [Split(body, Head(body[key], tied=True)) for key in EMBEDDINGS if key in body]
    return pairs


def has_candidates(model: nn.Module) -> bool:
    """Return whether ``model`` has a body and a head by name, so that it may split."""
    return bool(_candidates(model))


def is_capped(model: nn.Module) -> bool:
    """Return whether the configuration of ``model`` names a soft cap of its logits."""
    return bool(_values(_settings(model), _CAP))


def _settings(model: nn.Module) -> list[Any]:
    """Return the objects that may hold the numbers of a model's head."""
    outer = next((model[name] for name in _WRAPPERS if name in model), model)
    owners = [model, outer, *(outer[name] for name in _BODIES if name in outer)]
    configs = [getattr(owner, name, None) for owner in owners for name in ("args", "config")]
    return [*owners, *(config for config in configs if config is not None)]


def _values(settings: list[Any], *names: str) -> list[tuple[float, ...]]:
    """Return the numbers under ``names`` of each object that has them all, none of them zero."""
    rows = (tuple(getattr(one, name, None) for name in names) for one in settings)
    return [row for row in rows if all(isinstance(v, (int, float)) and v for v in row)]  # type: ignore[misc]


def _finishes(model: nn.Module) -> list[tuple[float, float | None]]:
    """Return (scale, cap) by which the logits of ``model`` may differ from its head's product."""
    settings = _settings(model)
    scales = [1.0]
    for names, scale in _SCALES.items():
        scales += [scale(*row) for row in _values(settings, *names)]
    caps = [None, _FIXED_CAP, *(row[0] for row in _values(settings, _CAP))]
    return [(scale, cap) for scale in dict.fromkeys(scales) for cap in dict.fromkeys(caps)]


def _scaled(body: _Body, scale: float) -> _Body:
    if scale == 1:
        return body
    return lambda *arguments, **named: body(*arguments, **named) * scale


def split(model: nn.Module, vocabulary: int = 8) -> Split | None:
    """Return body and head of ``model``, or None if no split reproduces its logits.

    Args:
        model: A model whose parameters are loaded.
        vocabulary: Token ids below this are used for the probe.
    """
    tokens_BT = mx.arange(8)[None] % max(2, vocabulary)
    expected = model(tokens_BT).astype(mx.float32)
    best: tuple[float, Split | None] = (math.inf, None)
    for candidate in _candidates(model):
        try:
            linear = candidate.head(candidate.body(tokens_BT, cache=None))
            same = linear.shape == expected.shape
        except (TypeError, ValueError, AttributeError):
            continue  # a body that wants other arguments, a head of another width
        for scale, cap in _finishes(model) if same else ():
            head = replace(candidate.head, cap=cap)
            logits = head.finish(linear * scale).astype(mx.float32)
            difference = logits_close(logits, expected, Change.HEAD)
            if difference.close and difference.gap < best[0]:  # small logits hardly show a cap
                best = difference.gap, Split(_scaled(candidate.body, scale), head)
                if difference.gap == 0:
                    return best[1]
    return best[1]


def is_linear(module: Any) -> bool:
    """Return whether ``module`` is a linear layer, dense or quantized, that returns W x + b.

    A subclass that a model class defines may return something else: afm7's returns a list.
    """
    return isinstance(module, _LINEAR_TYPES) and type(module).__module__.partition(".")[0] in (
        _PACKAGES
    )


class SegmentCache:
    """Packed rows kept apart, in the shape of a key-value cache that models already ask for a mask.

    Attention is causal inside a segment and blind across segments; rotary positions need no reset
    because attention is relative. A block that reads what another one wrote finds it in the cache
    of that block, so each has its own (``segment_caches``).
    """

    offset = 0

    def __init__(self, segments_BT: mx.array) -> None:
        same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
        positions = mx.arange(segments_BT.shape[1])
        self._distance = positions[:, None] - positions[None]
        self._mask = same & (self._distance >= 0)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys and values unchanged: nothing is remembered between passes."""
        self._latest = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return the keys and values that the block of this cache wrote."""
        return self._latest

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> mx.array:
        """Return the boolean mask (B, 1, T, T): causal, same segment, inside the window."""
        if window_size is None:
            return self._mask
        return self._mask & (self._distance < window_size)


def segment_caches(model: nn.Module, segments_BT: mx.array) -> list[SegmentCache]:
    """Return the caches of one pass over packed rows, as many as ``model`` makes; one mask."""
    from mlx_lm.models.cache import make_prompt_cache

    first = SegmentCache(segments_BT)
    return [copy.copy(first) for _ in make_prompt_cache(model)]


def supports_packing(model: nn.Module) -> bool:
    """Return whether packed segments stay apart in this model, checked on a probe.

    The last segment of each of two rows, packed otherwise, must see the same logits as alone.
    Recurrent layers and learned absolute positions fail this and are trained row by row.
    """
    tokens_BT = mx.arange(24).reshape(2, 12) % 7
    begins = (5, 7)
    segments_BT = mx.array([[0] * begin + [1] * (12 - begin) for begin in begins])
    try:
        both = model(tokens_BT, cache=segment_caches(model, segments_BT))
        rows = list(enumerate(begins))
        packed = mx.concatenate([both[row, begin:] for row, begin in rows])
        alone = mx.concatenate([model(tokens_BT[row : row + 1, begin:])[0] for row, begin in rows])
    except (TypeError, ValueError, AttributeError):
        return False
    return logits_close(packed, alone, Change.SHAPES).close


@dataclass(frozen=True)
class Coupled:
    """Groups that can only be removed as a whole (arXiv 2305.11627).

    A group of ``heads`` is one key-value head, its query heads and the output columns that read
    them; one of ``mlp`` is a neuron: its rows and its column; one of ``hidden`` is a channel of the
    residual stream, in all blocks at once (``residual.py``).

    Attributes:
        kind: ``heads``, ``mlp`` or ``hidden``.
        count: Groups.
        queries_per_group: Query heads of a group; 1 for neurons.
        width: Inputs of the output layer that a group owns.
        members: (path inside the block, axis) of each tensor; the axis is ``count`` equal slices in
            the order of the groups. Paths of ``hidden`` begin at the model.
        output: Path of the layer that reads the groups; empty for ``hidden``.
    """

    kind: str
    count: int
    queries_per_group: int
    width: int
    members: tuple[tuple[str, int], ...]
    output: str


def coupled(block: nn.Module) -> dict[str, Coupled]:
    """Return the families of coupled groups of a dense block; those that it is known to have."""
    families = {}
    attention, mlp = block.get(_ATTENTION), block.get(_FEED_FORWARD)
    if isinstance(attention, nn.Module):
        output = next((name for name in _OUTPUTS if name in attention), None)
        if output and all(name in attention for name in (_QUERIES, *_KEYS)):
            heads, groups = _count(attention, _HEAD_COUNTS), _count(attention, _KV_COUNTS)
            width = attention[output]["weight"].shape[1] // groups
            rows = (_QUERIES, *_KEYS)
            families[HEADS] = _family(
                HEADS, groups, heads // groups, width, _ATTENTION, attention, rows, output
            )
    if isinstance(mlp, nn.Module):
        names = next((names for names in _MLP_LAYERS if all(n in mlp for n in names)), None)
        if names:
            count = mlp[names[-1]]["weight"].shape[1]
            families[MLP] = _family(MLP, count, 1, 1, _FEED_FORWARD, mlp, names[:-1], names[-1])
    return families


def _family(
    kind: str,
    count: int,
    queries_per_group: int,
    width: int,
    path: str,
    owner: nn.Module,
    rows: tuple[str, ...],
    output: str,
) -> Coupled:
    members = [
        (f"{path}.{name}.{part}", 0)
        for name in rows
        for part in ("weight", "bias")
        if part in owner[name]
    ]
    members.append((f"{path}.{output}.weight", 1))
    return Coupled(kind, count, queries_per_group, width, tuple(members), f"{path}.{output}")


def _count(attention: nn.Module, names: tuple[str, ...]) -> int:
    return int(next(getattr(attention, name) for name in names if hasattr(attention, name)))


def head_counts(block: nn.Module) -> tuple[int, int]:
    """Return the query heads and the key-value heads of a block; 0 where it does not tell."""
    attention = block.get(_ATTENTION, block)
    queries = [name for name in _HEAD_COUNTS if hasattr(attention, name)]
    pairs = [name for name in _KV_COUNTS if hasattr(attention, name)] or queries
    return (_count(attention, _HEAD_COUNTS), _count(attention, (*pairs,))) if queries else (0, 0)


def resize(block: nn.Module, counts: dict[str, int]) -> None:
    """Give a dense block other numbers of groups, in place; its weights are zeros of new shapes.

    Args:
        block: As its class builds it.
        counts: ``heads`` (groups: key-value heads) and ``mlp`` (neurons); what is absent stays.
    """
    for kind, family in coupled(block).items():
        count = counts.get(kind, family.count)
        for path, axis in family.members:
            *names, leaf = path.split(".")
            layer = block
            for name in names:
                layer = layer[name]
            shape = list(layer[leaf].shape)
            shape[axis] = shape[axis] // family.count * count
            layer[leaf] = mx.zeros(shape, dtype=layer[leaf].dtype)
        if kind == HEADS:
            attention = block[_ATTENTION]
            for names, value in (
                (_HEAD_COUNTS, count * family.queries_per_group),
                (_KV_COUNTS, count),
            ):
                for name in names:
                    if hasattr(attention, name):
                        setattr(attention, name, value)
