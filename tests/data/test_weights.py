"""Weights of turns, from the row to the loss: kept on disk, in every kind of batch, on resume."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.data.batches import Batcher, collate
from mlx_slim.data.store import TokenRows, TokenStore, TokenWriter
from mlx_slim.data.tokenize import Tokens
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.step import Stepper
from mlx_slim.training.validation import LossScorer, validation_loss
from tests.support.tiny import tiny_model

Mode = Literal["grouped", "packed"]


def rows_of(seed: int, weighted: bool = True) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(4, 40, 30):
        weights = rng.choice([0.0, 0.0, 0.25, 1.0, 3.0] if weighted else [0.0, 1.0], length)
        weights[0], weights[length // 2] = 0, 1
        ids = rng.integers(0, 256, length).astype(np.int32)
        plain = set(weights.tolist()) <= {0.0, 1.0}
        weights = weights.astype(np.float32)
        rows.append(Tokens(ids, weights > 0, None if plain else weights))
    return rows


def store_of(folder: Any, *chunks: list[Tokens]) -> TokenStore:
    writer = TokenWriter(folder)
    for chunk in chunks:
        writer.add(TokenRows.of(chunk))
    writer.close()
    return TokenStore(folder)


def weights_of(row: Tokens) -> np.ndarray:
    return row.supervised_T.astype(np.float32) if row.weights_T is None else row.weights_T


def test_a_store_keeps_weights_wherever_they_begin(tmp_path: Path) -> None:
    plain, weighted = rows_of(0, weighted=False), rows_of(1)
    for number, chunks in enumerate(
        ([plain, weighted], [weighted, plain], [plain, weighted, plain])
    ):
        store = store_of(tmp_path / str(number), *chunks)
        for i, row in enumerate(row for chunk in chunks for row in chunk):
            ids, supervised = store.row(i)
            actual = store.weights(i)
            assert actual is not None
            assert actual.tolist() == weights_of(row).tolist()
            assert ids.tolist() == row.ids_T.tolist()
            assert supervised.tolist() == row.supervised_T.tolist()
    store = store_of(tmp_path / "plain", plain)
    assert store.weights(0) is None
    assert not (tmp_path / "plain" / "weights.bin").exists()
    store_of(tmp_path / "cut", weighted)
    with (tmp_path / "cut" / "weights.bin").open("r+b") as handle:
        handle.truncate(8)
    with pytest.raises(SlimError, match="damaged"):
        TokenStore(tmp_path / "cut")


@pytest.mark.parametrize("mode", ["grouped", "packed"])
@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("seed", range(3))
def test_every_target_is_asked_for_once_with_its_weight(
    tmp_path: Path, mode: Mode, limit: int | None, seed: Any
) -> None:
    rows = rows_of(seed)
    store = store_of(tmp_path, rows)
    batcher = Batcher(store, 160, 48, mode, seed, limit)
    expected = sorted(
        (int(row.ids_T[t]), float(weights_of(row)[t]))
        for row in rows
        for t in np.flatnonzero(row.supervised_T)
    )
    for epoch in range(2):
        actual, total, count = [], 0.0, 0
        for groups in batcher.plan(epoch):
            whole = batcher.batch(groups)
            assert whole.weights_N is not None
            for batch in whole.shards(random.Random(epoch).randint(1, 3)):
                weights = batch.weights_N
                weights = np.ones(len(batch.targets_N)) if weights is None else weights
                actual += [
                    (int(t), float(w)) for t, w in zip(batch.targets_N, weights, strict=True)
                ]
                total += batch.total_weight
                count += batch.supervised_tokens
        assert sorted(pair for pair in actual if pair[1] > 0) == expected
        assert count == len(expected)
        assert total == pytest.approx(sum(weight for _, weight in expected))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tiny_model(tmp_path_factory.mktemp("model")), dtype=mx.float32).model


def reference(model: Any, rows: list[Tokens]) -> float:
    """Σ w · NLL / Σ w, row by row, from all logits."""
    nats = total = 0.0
    for row in rows:
        logits_TV = np.array(model(mx.array(row.ids_T[None, :-1])))[0].astype(np.float64)
        log_p = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        nll_T = -log_p[np.arange(len(log_p)), row.ids_T[1:]]
        weights_T = weights_of(row)[1:].astype(np.float64)
        nats += float((nll_T * weights_T).sum())
        total += float(weights_T.sum())
    return nats / total


@pytest.mark.parametrize("mode", ["grouped", "packed"])
@pytest.mark.parametrize("limit", [None, 4])
def test_the_loss_is_the_weighted_mean(
    tmp_path: Path, model: Any, mode: Mode, limit: int | None
) -> None:
    rows = rows_of(5)
    store = store_of(tmp_path, rows)
    batcher = Batcher(store, 160, 48, mode, 0, limit)
    objective = CrossEntropy(model)
    expected = reference(model, rows)
    loss, _, supervised = validation_loss(LossScorer(model, objective), batcher)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert supervised == sum(int(row.supervised_T.sum()) for row in rows)
    batches = [batcher.batch(groups) for groups in batcher.plan(0)]
    steps = [
        Stepper(model, objective, num_threads=num_threads).step(batches) for num_threads in (1, 2)
    ]
    for step in steps:
        assert step.loss == pytest.approx(expected, rel=1e-5)
        assert step.supervised == supervised
    one = Stepper(model, objective).step([collate(store, [[i] for i in range(len(store))],
                                                  isolate=False)])  # fmt: skip
    for path, gradient in one.gradients.items():
        assert np.allclose(np.array(steps[0].gradients[path]), np.array(gradient), atol=1e-5)


def test_equal_weights_are_no_weights(tmp_path: Path, model: Any) -> None:
    rows = rows_of(7, weighted=False)
    twice = [row._replace(weights_T=2 * weights_of(row)) for row in rows]
    results = []
    for name, some in (("one", rows), ("two", twice)):
        store = store_of(tmp_path / name, some)
        batch = collate(store, [[i] for i in range(len(store))], isolate=False)
        results.append(Stepper(model, CrossEntropy(model)).step([batch]))
    plain, doubled = results
    assert doubled.loss == pytest.approx(plain.loss, rel=1e-6)
    for path, gradient in plain.gradients.items():
        assert np.allclose(np.array(doubled.gradients[path]), np.array(gradient), atol=1e-6)


CHAT = {"messages": [
    {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is five."},
    {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Sorry, four."},
]}  # fmt: skip


def with_weight(weight: float) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [dict(turn) for turn in CHAT["messages"]]
    turns[1]["weight"] = weight
    return {"messages": turns}


def test_counts_and_truncation_know_the_weights(make: Any, tokens: Any) -> None:
    whole = make([CHAT, with_weight(0), with_weight(0.5)])
    counts = whole.train.supervised.tolist()
    wrong = len("It is five.") + 2  # what ends the turn, and a newline
    assert counts == [counts[0], counts[0] - wrong, counts[0]]
    assert whole.ledger["totals"]["supervised_tokens"] == sum(counts)
    weights = whole.train.weights(2)
    assert weights is not None
    assert sorted(set(weights.tolist())) == [0.0, 0.5, 1.0]
    assert (weights == 0.5).sum() == wrong
    for truncation in ("left", "right"):
        cut = make([with_weight(0.5)], truncation=truncation, max_length=60)
        weights, ids = cut.train.weights(0), cut.train.row(0)[0]
        assert weights is not None
        assert len(weights) == len(ids) == 60
        assert ((weights > 0) == cut.train.row(0)[1]).all()
        assert tokens.decode(ids[weights == 0.5]) in "It is five.<|im_end|>\n"


def test_an_end_token_that_is_added_has_its_turns_weight(make: Any, base_tokens: Any) -> None:
    row = with_weight(1)
    row["messages"][3]["weight"] = 0
    prepared = make([row], tokenizer=base_tokens, template="plain")
    ids, supervised = prepared.train.row(0)
    assert base_tokens.decode(ids).endswith("four.<|endoftext|>")
    assert base_tokens.decode(ids[supervised]) == "It is five.<|endoftext|>"
    assert not supervised[-1]


def test_learning_the_last_answer_only_is_another_data_set(make: Any, tokens: Any) -> None:
    every, last = make([CHAT]), make([CHAT], learn="last")
    ids, supervised = last.train.row(0)
    assert tokens.decode(ids[supervised]) == "Sorry, four.<|im_end|>\n"
    assert every.fingerprint != last.fingerprint
    assert every.train.fingerprint != last.train.fingerprint
