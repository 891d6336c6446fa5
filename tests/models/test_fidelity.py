"""The distance between two models, against a plain computation."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models import fidelity

V = 11
TOKENS = mx.random.randint(0, V, (3, 9), key=mx.random.key(1))
SOURCE, OTHER = (3 * mx.random.normal((V, V), key=mx.random.key(k)) for k in (2, 3))


def test_equal_models_are_at_zero() -> None:
    actual = fidelity.compare(lambda x: SOURCE[x], lambda x: SOURCE[x], TOKENS)
    assert actual.kl == 0.0 and actual.top1 == 1.0 and actual.tokens == 27
    assert actual.nll_source == actual.nll_model


@pytest.mark.parametrize("chunk", [1, 4, 9, 64])
def test_against_a_plain_computation(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(fidelity, "CHUNK", chunk)
    actual = fidelity.compare(lambda x: SOURCE[x], lambda x: OTHER[x], TOKENS)
    tokens = np.array(TOKENS)

    def log_softmax(table: mx.array) -> np.ndarray:
        logits = np.array(table, np.float64)[tokens]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    p, q = log_softmax(SOURCE), log_softmax(OTHER)
    assert actual.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-5)
    assert actual.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    for log, nll in ((p, actual.nll_source), (q, actual.nll_model)):
        target = np.take_along_axis(log[:, :-1], tokens[:, 1:, None], -1)
        assert nll == pytest.approx(-target.mean(), rel=1e-5)


def test_refusals() -> None:
    with pytest.raises(SlimError, match="11 and 10 logits"):
        fidelity.compare(lambda x: SOURCE[x], lambda x: SOURCE[x][..., :10], TOKENS)
    with pytest.raises(SlimError, match="not finite"):
        fidelity.compare(lambda x: SOURCE[x], lambda x: SOURCE[x] * mx.inf, TOKENS)
