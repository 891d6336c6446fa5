"""The tokenizer that a GGUF file carries, as a Hugging Face fast tokenizer.

Invariant: the same text gives the token ids of the original tokenizer; a pre-tokenizer that is not
known here is refused, never guessed. Try it: ``mlx-slim convert model.gguf -o DIR`` and look at
``DIR/tokenizer.json``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_slim.errors import SlimError, did_you_mean

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# How text is cut before merging, by tokenizer.ggml.pre.
_GPT2 = "gpt2"
_DIGITS = "digits, then gpt2"
# Digits alone here too, but cut last: "\n\n2" gives "\n" "\n" "2" and not "\n\n" "2". So do the
# PyTorch reference ids that this import is checked against; nothing else differs.
_SMOLLM = "gpt2, then digits"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def build_tokenizer(metadata: dict[str, Any], notes: list[str]) -> PreTrainedTokenizerFast:
    """Return the tokenizer described by ``tokenizer.ggml.*``, with its chat template.

    Args:
        metadata: The GGUF metadata.
        notes: Gets a line for whatever had to be assumed.

    Raises:
        SlimError: If the file has none, or one of a kind that cannot be rebuilt.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = metadata.get("tokenizer.ggml.tokens")
    kind = metadata.get("tokenizer.ggml.model")
    if not tokens or kind not in ("gpt2", "llama"):
        raise SlimError(
            f"the GGUF file has a tokenizer of type {kind!r}, expected 'gpt2' or 'llama'",
            "convert the original Hugging Face folder instead",
        )
    tokenizer = _bpe(metadata, tokens, notes) if kind == "gpt2" else _spm(metadata, tokens)
    _add_special_tokens(tokenizer, metadata, tokens)
    _add_post_processor(tokenizer, metadata, tokens, kind)
    names = {
        f"{role}_token": tokens[index]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := _id(metadata, key)) is not None and index < len(tokens)
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    if context := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        fast.model_max_length = int(context)
    return fast


def _id(metadata: dict[str, Any], role: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return None if value is None else int(value)


def _bpe(metadata: dict[str, Any], tokens: list[str], notes: list[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        pre = "gpt-2"
        notes.append("the file names no pre-tokenizer: GPT-2's is assumed")
    if pre not in PRE_TOKENIZERS:
        raise SlimError(
            f"the pre-tokenizer {pre!r} of the GGUF file is not known here",
            f"{did_you_mean(pre, PRE_TOKENIZERS)}; or convert the original Hugging Face folder",
        )
    cut = PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut is _LLAMA3))
    if cut is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    space = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=space, use_regex=cut in (_GPT2, _DIGITS, _SMOLLM)
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    steps: list[Any]
    if cut is _DIGITS:
        steps = [digits, byte_level]
    elif cut is _SMOLLM:
        steps = [byte_level, digits]
    elif cut is _GPT2:
        steps = [byte_level]
    else:
        steps = [pre_tokenizers.Split(Regex(cut), behavior="isolated"), byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spm(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE: pieces are merged best score first, unknown characters become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise SlimError("the GGUF file's SentencePiece tokenizer has no scores")
    unknown = _id(metadata, "unknown")
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocab.setdefault(token, index)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(metadata, tokens, scores, vocab),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("▁")] if space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(content=" ", left=1)] if space else []
    tokenizer.decoder = decoders.Sequence([*parts, *strip])
    return tokenizer


def _merges(
    metadata: dict[str, Any], tokens: list[str], scores: Any, vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece, best score of the result first."""
    types = metadata.get("tokenizer.ggml.token_type")
    plain = {
        token
        for index, token in enumerate(tokens)
        if types is None or int(types[index]) in (_NORMAL, _UNUSED)
    }
    found = [
        (-float(scores[vocab[token]]), vocab[token[:cut]], token[:cut], token[cut:])
        for token in plain
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _add_special_tokens(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type")
    special = {
        index
        for role in ("bos", "eos", "unknown", "padding", "eot", "eom", "separator")
        if (index := _id(metadata, role)) is not None and index < len(tokens)
    }
    user = set()
    for index, kind in enumerate([] if types is None else types.tolist()):
        if kind in (_CONTROL, _UNKNOWN):
            special.add(index)
        elif kind == _USER:
            user.add(index)
    for index in sorted(special | user):
        token = AddedToken(tokens[index], normalized=False, special=index in special)
        if index in special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])


def _add_post_processor(
    tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], kind: str
) -> None:
    """Put BOS before and EOS after, where the file says so (BOS is SentencePiece's default)."""
    from tokenizers import processors

    llama3 = PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre", "")) is _LLAMA3
    bos, eos = _id(metadata, "bos"), _id(metadata, "eos")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or llama3)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    before = [tokens[bos]] if add_bos and bos is not None else []
    after = [tokens[eos]] if add_eos and eos is not None else []
    byte_level = processors.ByteLevel(trim_offsets=False)
    steps: list[Any] = [byte_level] if kind == "gpt2" else []
    if before or after:
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(before + after)]
        single = [*before, "$A", *after]
        pair = [*single, *(f"{token}:1" for token in before), "$B:1"]
        pair += [f"{token}:1" for token in after]
        steps.append(processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids))
    if steps:
        tokenizer.post_processor = processors.Sequence(steps) if len(steps) > 1 else steps[0]
