"""Long texts as several rows: every token is learned once, whatever the batches are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mlx_slim.config.schema import DataConfig, SourceConfig
from mlx_slim.data import tokenize
from mlx_slim.data.batches import Batcher
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.pieces import pieces, split
from mlx_slim.data.pipeline import Pipeline
from mlx_slim.data.sources import find
from mlx_slim.data.tokenize import RowEncoder, Tokens
from mlx_slim.errors import SlimError


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize(("limit", "context"), [(8, 1), (8, 6), (16, 5), (31, 29)])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 100])
def test_every_supervised_token_is_in_one_piece(
    bos: int | None, limit: int, context: int, length: int
) -> None:
    rng = np.random.default_rng(length)
    ids = np.arange(100, 100 + length, dtype=np.int32)
    if bos is not None:
        ids[0] = bos
    supervised = rng.random(length) < 0.7
    supervised[0] = False
    weights = np.where(supervised, rng.random(length) + 0.5, 0).astype(np.float32)
    cut_rows = split(Tokens(ids, supervised, weights), limit, context, bos)
    pairs: list[tuple[int, float]] = []
    for part in cut_rows:
        assert part.weights_T is not None
        pairs += zip(part.ids_T.tolist(), part.weights_T.tolist(), strict=True)
    learned = [(int(t), float(w)) for t, w in pairs if w]
    assert learned == [(int(t), float(w)) for t, w in zip(ids, weights, strict=True) if w]
    for number, part in enumerate(cut_rows):
        assert len(part.ids_T) <= limit
        assert not part.supervised_T[0]
        head = int(bos is not None)
        assert bos is None or part.ids_T[0] == bos
        if number:  # the context, then what is new, as they stand in the row
            assert np.array_equal(np.diff(part.ids_T[head:]), np.ones(len(part.ids_T) - head - 1))
            assert part.ids_T[head + context - 1] == cut_rows[number - 1].ids_T[-1]


def test_pieces_have_the_context_of_the_docstring() -> None:
    assert [tuple(p) for p in pieces(8, 5, 2, 1)] == [(1, 5, 0), (3, 7, 2), (5, 8, 2)]


@pytest.mark.parametrize("mode", ["grouped", "packed"])
@pytest.mark.parametrize("shapes", [None, 8])
def test_an_epoch_learns_every_token_once(
    make: Any, base_tokens: Any, mode: Any, shapes: int | None
) -> None:
    """Packed and grouped, padded to few shapes or not; the last targets included."""
    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in (3, 40, 100, 700)]
    whole = make([{"text": text} for text in texts], tokenizer=base_tokens).train
    expected = Counter(t for i in range(4) for t in whole.row(i)[0][whole.row(i)[1]].tolist())
    rows = make([{"text": t} for t in texts], tokenizer=base_tokens, max_length=32).train
    assert rows.lengths.max() == 32
    assert len(rows) > 25
    batcher = Batcher(rows, 128, 32, mode, 0, shapes)
    targets: Counter[int] = Counter()
    for groups in batcher.plan(1):
        batch = batcher.batch(groups)
        counted = slice(None) if batch.weights_N is None else batch.weights_N > 0
        targets.update(batch.targets_N[counted].tolist())
    assert targets == expected


def test_the_ledger_counts_what_was_split(make: Any, tokens: Any) -> None:
    rows = [{"text": "a" * 200}, {"text": "b"}, {"prompt": "p" * 99, "completion": "c"}]
    prepared = make(rows, max_length=64, split_overlap=8)
    record = prepared.ledger["sources"][0]
    whole = 201  # with the EOS
    assert record["rows_split"] == {"count": 1, "first": ["rows.jsonl, line 1"]}
    assert (record["rows_given"], record["rows_used"]) == (3, 2)
    assert record["rows_dropped"]["longer than 64 tokens"]["count"] == 1
    assert record["rows_after_splitting"] == len(prepared.train) == 1 + 4
    assert record["tokens_repeated_as_context"] == 3 * 8
    assert record["tokens"] == int(prepared.train.lengths.sum()) == whole + 24 + 2
    assert record["supervised_tokens"] == int(prepared.train.supervised.sum()) == whole - 1 + 1
    assert prepared.ledger["totals"]["rows_split"] == 1


def test_what_is_split_and_what_is_not(make: Any) -> None:
    text = [{"text": "t" * 300}, {"text": "x"}]
    assert len(make(text, max_length=64, split=False).train) == 1
    assert len(make(text, max_length=64, truncation="right").train) == 2
    with pytest.raises(SlimError, match=r"longer than train\.max_length=64"):
        make(text, max_length=64, truncation="error")
    chat = [{"prompt": "p" * 100, "completion": "c" * 200}, {"prompt": "a", "completion": "b"}]
    assert len(make(chat, max_length=64).train) == 1
    prepared = make(chat, max_length=64, split=True)
    whole = make(chat).train
    assert prepared.train.supervised.sum() == whole.supervised.sum()
    (note,) = prepared.ledger["sources"][0]["rows_noted"]
    assert note == "pieces without a token to learn, left out"
    with pytest.raises(ValueError, match="split=true leaves no row too long, and truncation=right"):
        DataConfig(split=True, truncation="right")
    with pytest.raises(SlimError, match=r"split_overlap=63 leaves no new token .* at most 62"):
        make(text, max_length=64, split_overlap=63)


@pytest.mark.parametrize("validation", [0.5, 2])
def test_pieces_of_a_text_are_on_one_side(make: Any, validation: float) -> None:
    """The first characters of each text say which one a piece is of."""
    rows = [{"text": chr(97 + i) * (150 + 10 * i)} for i in range(6)]
    prepared = make(rows, max_length=32, validation=validation)
    sides = [
        {chr(store.row(i)[0][0]) for i in range(len(store))}
        for store in (prepared.train, prepared.validation)
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 6
    assert len(sides[1]) == (3 if validation == 0.5 else 2)
    numbers = [set(store.texts.tolist()) for store in (prepared.train, prepared.validation)]
    assert not numbers[0] & numbers[1]


def test_a_resume_of_an_older_version_splits_nothing_silently(make: Any) -> None:
    """Rows of a run that dropped its long texts are not taken for the rows of today."""
    rows = [{"text": "t" * 300}, {"text": "x"}]
    old, today = (make(rows, max_length=64, split=split).fingerprint for split in (False, "auto"))
    assert old != today


def test_a_window_at_a_time_gives_the_tokens_of_the_whole_text(
    monkeypatch: pytest.MonkeyPatch, smollm2: Any
) -> None:
    """A real tokenizer, windows that cut words, numbers and characters of several bytes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rng = np.random.default_rng(1)
    words = ["the ", "Ünïcode ", "don't ", "\n\n", "   ", "1234567 ", "🙂🙃", "x=y; ", "<|im_end|>"]
    text = "".join(words[i] for i in rng.integers(0, len(words), 4000))
    encoder = RowEncoder(tokenizer, mask_prompt=True)
    ids_T, begin_T = encoder._placed([text])[0]
    monkeypatch.setattr(tokenize, "_CHARACTERS", 1500)
    monkeypatch.setattr(tokenize, "_MARGIN", 200)
    windows = encoder._windows(text)
    assert np.array_equal(windows[0], ids_T)
    assert np.array_equal(windows[1], begin_T)
    same = "ab" * 9000  # never the same tokens where the windows meet, unless they are cut alike
    assert np.array_equal(encoder._windows(same)[0], encoder._placed([same])[0][0])


def test_a_long_text_is_read_in_windows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, base_tokens: Any
) -> None:
    """No call of the tokenizer gets more than a window, and the rows are the same."""
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {n} of a book\n" for n in range(400)))

    def rows() -> list[list[int]]:
        config = DataConfig(path=str(file))
        pipeline = Pipeline(config, base_tokens, max_length=64)
        source = SourceConfig(path=str(file))
        ledger = SourceLedger("", "", 1.0, [])
        return [row.tokens.ids_T.tolist() for row in pipeline.rows(find(source), source, ledger)]

    whole, longest = rows(), []
    monkeypatch.setattr(tokenize, "_CHARACTERS", 1000)
    monkeypatch.setattr(tokenize, "_MARGIN", 100)
    placed = RowEncoder._placed

    def seen(self: RowEncoder, texts: list[str]) -> Any:
        longest.append(max(map(len, texts)))
        return placed(self, texts)

    monkeypatch.setattr(RowEncoder, "_placed", seen)
    assert rows() == whole
    assert max(longest) == 1100
