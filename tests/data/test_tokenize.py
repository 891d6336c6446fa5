"""Which side of the border a token is on, for both ways that tokenizers report offsets."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlx_slim.data import tokenize
from mlx_slim.data.templates import Rendered
from mlx_slim.data.tokenize import RowEncoder, _first_characters, _next_words
from mlx_slim.errors import SlimError


def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer of the sentencepiece kind: words carry their space, and its offset."""
    words = ["<unk>", "<s>", "</s>", "▁Q:", "▁yes", "▁", "▁no"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of the GPT-2 kind, with words that carry their space, its offset trimmed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges = [("Ġ", "y"), ("Ġy", "e"), ("Ġye", "s"), ("Ġ", "Ġ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("make", [metaspace, byte_level])
@pytest.mark.parametrize(("prompt", "answer"), [("Q:", " yes"), ("Q: ", "yes")])
def test_a_straddling_word_belongs_to_the_answer(make: Any, prompt: str, answer: str) -> None:
    tokenizer = make()
    row = Rendered(prompt + answer, [(len(prompt), len(prompt + answer))])
    ids, supervised, _ = RowEncoder(tokenizer, mask_prompt=True).encode([row])[0]
    assert tokenizer.convert_ids_to_tokens(ids[supervised])[-2:] in (
        ["▁yes", "</s>"],
        ["Ġyes", "</s>"],
    )
    assert supervised.sum() == 2


def test_spaces_before_the_border_belong_to_the_prompt() -> None:
    tokenizer = byte_level()
    row = Rendered("Q:   yes", [(5, 8)])
    ids, supervised, _ = RowEncoder(tokenizer, mask_prompt=True).encode([row])[0]
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["Q", ":", "ĠĠ", "Ġyes", "</s>"]
    assert supervised.tolist() == [False, False, False, True, True]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(SlimError, match="Slow gives no character offsets"):
        RowEncoder(Slow(), mask_prompt=True)


def _first_characters_one_by_one(text: str, offsets: np.ndarray) -> list[int]:
    firsts, end_before = [], 0
    for start, end in offsets.tolist():
        piece = text[start:end]
        first = start if piece else min(end_before, start)
        firsts.append(first + (len(piece) - len(piece.lstrip()) if piece.strip() else 0))
        end_before = max(end_before, end)
    return firsts


@pytest.mark.parametrize("seed", range(20))
def test_first_characters_equal_those_of_a_slow_reference(seed: Any) -> None:
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("ab é\n\t\u00a0\u2003\u3000\u3001𝒳😀\ufeff"), 80))
    ends = np.sort(rng.integers(0, len(text) + 1, 40))
    starts = np.append(0, ends[:-1]) - rng.integers(0, 2, 40) * (ends > 2)  # may overlap
    offsets = np.stack([np.clip(starts, 0, ends), ends], 1)
    offsets[rng.integers(0, 40, 5), 0] = offsets[rng.integers(0, 40, 5), 1].min()
    offsets[:, 0] = np.minimum(offsets[:, 0], offsets[:, 1])
    firsts = _first_characters(text, offsets).tolist()
    assert firsts == _first_characters_one_by_one(text, offsets)


def test_spaces_are_those_of_python() -> None:
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    spaces = np.array([character.isspace() for character in text])
    assert ((_next_words(text)[:-1] > np.arange(len(text))) == spaces).all()
    assert _next_words(" a ").tolist() == [1, 1, 3, 3]
    assert _next_words("").tolist() == [0]


def test_long_texts_are_tokenized_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    encoder = RowEncoder(tokenizer, mask_prompt=True)
    rows = [Rendered("x" * size, [(0, size)]) for size in (5, 30, 3, 4, 40, 2)]
    whole = encoder.encode(rows)
    sizes, original = [], encoder._encode

    def counting(part: Any) -> Any:
        sizes.append(len(part))
        return original(part)

    monkeypatch.setattr(tokenize, "_CHARACTERS", 10)
    monkeypatch.setattr(encoder, "_encode", counting)
    pieces = encoder.encode(rows)
    assert sizes == [2, 3, 1]
    assert [row.ids_T.tolist() for row in pieces] == [row.ids_T.tolist() for row in whole]
    assert encoder.encode([]) == []
