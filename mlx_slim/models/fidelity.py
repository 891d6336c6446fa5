"""How far a changed model is from its source, token by token.

Invariant: both models read the same tokens, the comparison is made in float32, and at most one
row's logits of each model exist at a time. Try it: ``mlx-slim quantize MODEL -o DIR``.

Shapes: N rows, T tokens a row, C positions compared at a time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_slim.errors import SlimError
from mlx_slim.models.logits import kl_divergence, token_nll
from mlx_slim.progress import tracked

CHUNK = 64  # positions whose probabilities exist at one time

Model = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Fidelity:
    """The distance of a model from its source.

    Attributes:
        kl: Mean KL(source ‖ model) over positions, nats; 0 for equal models.
        top1: Share of positions where both find the same token likeliest.
        nll_source: Mean next-token loss of the source, nats.
        nll_model: Mean next-token loss of the model, nats.
        tokens: Positions compared.
    """

    kl: float
    top1: float
    nll_source: float
    nll_model: float
    tokens: int


def compare(source: Model, model: Model, tokens_NT: mx.array) -> Fidelity:
    """Compare ``model`` with ``source`` on rows that neither was trained on.

    Args:
        source: Token ids (1, T) to logits (1, T, V).
        model: The same, over the same vocabulary.
        tokens_NT: Token ids, int32; T at least 2.

    Raises:
        SlimError: If the vocabularies differ, or a logit is not finite.
    """
    rows, length = tokens_NT.shape
    kl = agree = nll_source = nll_model = 0.0
    for row_T in tracked(tokens_NT, "comparing", "rows", rows):
        p_TV, q_TV = source(row_T[None])[0], model(row_T[None])[0]
        if p_TV.shape != q_TV.shape:
            raise SlimError(
                f"the models have {p_TV.shape[-1]:,} and {q_TV.shape[-1]:,} logits a token",
                "only models over one vocabulary can be compared",
            )
        mx.eval(p_TV)  # before the other's: one head is read or rebuilt at a time
        mx.eval(q_TV)
        for start in range(0, length, CHUNK):
            next_C = row_T[start + 1 : start + CHUNK + 1]
            sums = _compare(p_TV[start : start + CHUNK], q_TV[start : start + CHUNK], next_C)
            means = [float(part) for part in sums.tolist()]  # pyright: ignore
            kl, agree = kl + means[0], agree + means[1]
            nll_source, nll_model = nll_source + means[2], nll_model + means[3]
    tokens, targets = rows * length, rows * (length - 1)
    if not mx.isfinite(mx.array([kl, nll_source, nll_model])).all():
        raise SlimError(
            "a logit is not finite: the comparison means nothing",
            "the source or the quantized weights are damaged, or overflow their dtype",
        )
    return Fidelity(
        # Rounding may leave equal models a hair below zero.
        kl=max(0.0, kl / tokens),
        top1=agree / tokens,
        nll_source=nll_source / targets,
        nll_model=nll_model / targets,
        tokens=tokens,
    )


def _compare(p_CV: mx.array, q_CV: mx.array, next_C: mx.array) -> mx.array:
    """Return the sums (KL, agreement, source loss, model loss) over C positions, float32.

    next_C[i] is the token that position i predicts; the row's last position has none.
    """
    kl = kl_divergence(p_CV, q_CV).sum()
    agree = (p_CV.argmax(-1) == q_CV.argmax(-1)).sum().astype(mx.float32)
    count = len(next_C)
    losses = [token_nll(x_CV[:count], next_C).sum() for x_CV in (p_CV, q_CV)]
    return mx.stack([kl, agree, *losses])
