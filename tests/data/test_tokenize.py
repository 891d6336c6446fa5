"""Which side of the border a token is on, for both ways that tokenizers report offsets."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlx_slim.data.templates import Rendered
from mlx_slim.data.tokenize import Encoder
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
def test_a_straddling_word_belongs_to_the_answer(make, prompt, answer):
    tokenizer = make()
    row = Rendered(prompt + answer, [(len(prompt), len(prompt + answer))])
    ids, supervised = Encoder(tokenizer, mask_prompt=True).encode([row])[0]
    assert tokenizer.convert_ids_to_tokens(ids[supervised])[-2:] in (
        ["▁yes", "</s>"],
        ["Ġyes", "</s>"],
    )
    assert supervised.sum() == 2


def test_spaces_before_the_border_belong_to_the_prompt():
    tokenizer = byte_level()
    row = Rendered("Q:   yes", [(5, 8)])
    ids, supervised = Encoder(tokenizer, mask_prompt=True).encode([row])[0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["Q", ":", "ĠĠ", "Ġyes", "</s>"]
    assert supervised.tolist() == [False, False, False, True, True]


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(SlimError, match="Slow gives no character offsets"):
        Encoder(Slow(), mask_prompt=True)
