"""Texts encoded from what they share with the one before: always the ids of the whole text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

from mlx_slim.evaluation import encoding
from mlx_slim.evaluation.encoding import PrefixEncoder
from mlx_slim.evaluation.tasks.prompts import build_questions
from mlx_slim.evaluation.tasks.rows import load_rows
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.models.load import load_tokenizer

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES = [
    "The answer is", "Question: what", "Answer:", " Ann has 12 coins", "A. one", "B. two", "\n",
    "\n\n", " ", "  ", "\t", "\r\n", "é", "e\u0301", "日本", "🙂", "<|im_end|>", "'s", "1234", "x",
    " \n", "\n ", "#### 7", "\u2028", "a\nA", "\nZebra", "</s>", "\x85", "Ċa",
]  # fmt: skip
CORPUS = ["The answer is Ann's.\nQuestion: what has 12 coins?\n\nA. one\nB. two\nAnswer: two"] * 20


def _byte_level(*splits: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    splitters = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [*splitters, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece(pre_tokenizer: Any = None, prepend: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [*steps, normalizers.Replace(" ", "▁")]
    )
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    splitters = [pre_tokenizers.Split("\n", "isolated")]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = tokenizer.normalizer
    learner.pre_tokenizer = pre_tokenizers.Sequence(splitters)  # type: ignore[assignment]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(CORPUS, trainer)

    state = json.loads(learner.to_str())["model"]
    vocab = state["vocab"]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    vocab.pop("\n", None)
    vocab = {token: place for place, token in enumerate(vocab)}
    merges = [tuple(pair) for pair in state["merges"] if "\n" not in "".join(pair)]
    tokenizer.model = models.BPE(  # type: ignore[assignment]
        vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    return tokenizer


def _lines() -> Tokenizer:
    """A tokenizer that learned line feeds together with what follows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(Regex(r"\s*\S+"), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _unigram(newline_is_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    if newline_is_space:
        tokenizer.normalizer = normalizers.Replace("\n", " ")  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS = {
    "gpt-2": (_byte_level, True),
    "llama-3": (lambda: _byte_level(LLAMA_3), True),
    "deepseek": (lambda: _byte_level(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\p{N}"), True),
    "llama-2": (_sentencepiece, True),
    "gemma": (
        lambda: _sentencepiece(pre_tokenizers.Split(" ", "merged_with_previous"), prepend=False),
        True,
    ),
    "lines": (_lines, False),
    "unigram": (lambda: _unigram(False), None),
    "t5": (lambda: _unigram(True), False),
    "bert": (_wordpiece, None),
}


def _wrapped(tokenizer: Tokenizer, ends: str, **added: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts ``<s>``, ``</s>``, both or neither around a text."""
    special = ["<s>", "</s>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, **added) for text in special])
    pairs = [(text, tokenizer.token_to_id(text)) for text in special[:2]]
    around = {"": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}[ends]
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single=around, special_tokens=pairs
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("ends", ["", "bos", "eos", "both"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_ids_are_those_of_the_whole_text(
    kind: Any, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_WORTH", 1)  # the shortest texts too
    make, has_cuts = KINDS[kind]
    tokenizer = _wrapped(make(), ends, rstrip=ends == "both", lstrip=ends == "eos")
    encoder = PrefixEncoder(tokenizer)  # type: ignore[arg-type]
    if has_cuts is not None:
        assert bool(encoder._fronts) == has_cuts
    draw = random.Random(f"{kind} {ends}")
    text, shared = "The first of them.\n" * 5, 0
    for _ in range(400):
        begin = text[: draw.randrange(len(text) + 1)] if draw.random() < 0.9 else ""
        text = begin + "".join(draw.choices(PIECES, k=draw.randrange(1, 12)))
        if len(text) > 400:
            text = "The first of them.\n" * 5
        for special in (True, False) if draw.random() < 0.2 else (True,):
            expected = tokenizer.encode(text, add_special_tokens=special)
            assert encoder.encode(text, special) == expected, repr(text)
            shared += encoder._cut[0] > 0
    assert shared > 40 or not encoder._fronts


@pytest.mark.parametrize("token", ["\nA", "Answer", "a\nB"])
def test_tokens_across_a_cut_turn_it_off(token: str) -> None:
    tokenizer = _wrapped(_byte_level(), "")
    tokenizer.add_tokens([AddedToken(token)])
    encoder = PrefixEncoder(tokenizer)  # type: ignore[arg-type]
    assert not encoder._fronts
    for text in ("Some words.\n" * 8 + "Answer: x", "Some words.\n" * 8 + "Answering"):
        assert encoder.encode(text, True) == tokenizer.encode(text)


class _Counting:
    """A tokenizer that counts the characters that it encodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.characters = 0

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any):
        self.characters += len(text)
        return self._tokenizer.encode(text, **options)


def test_a_context_is_encoded_once_for_its_choices() -> None:
    counting = _Counting(_wrapped(_byte_level(), "bos"))
    encoder = PrefixEncoder(counting)  # type: ignore[arg-type]
    shots = "".join(f"Question: number {i}?\nAnswer: {i}\n\n" for i in range(40))
    counting.characters = 0
    contexts = [f"{shots}Question: and {i}?\nAnswer:" for i in range(10)]
    for context in contexts:
        for text in (context + " A", context, *(f"{context} {c}" for c in "BCD")):
            encoder.encode(text, True)
    assert counting.characters < 3 * len(shots)  # of 50 times


def test_real_prompts(smollm2: Path, data_mirror: Path) -> None:
    task = find_task("mmlu")
    questions = build_questions(task, load_rows(task, data_mirror), limit=1)
    tokenizer = load_tokenizer(smollm2)
    encoder = PrefixEncoder(tokenizer)
    assert encoder._fronts
    for question in questions:
        for text in (question.context + question.choices[0], question.context):
            assert encoder.encode(text, True) == tokenizer.encode(text)
