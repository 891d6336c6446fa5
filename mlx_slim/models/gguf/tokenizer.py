"""The tokenizer that a GGUF file carries, as a Hugging Face fast tokenizer.

Invariant: the same text gives the token ids of the original tokenizer; a pre-tokenizer that is not
known here is refused, never guessed, and so is a file that lacks what its kind of tokenizer needs.
Try it: ``mlx-slim convert model.gguf -o DIR`` and look at
``DIR/tokenizer.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.models.gguf.probe import check_rebuilt
from mlx_slim.reading import GGUFMetadata, library_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TEMPLATE = "tokenizer.chat_template"
_HINT = "convert the original Hugging Face folder instead"
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SPECIAL = ("bos", "eos", "unknown", "padding", "eot", "eom", "separator")
# (left, right) -> how early the pair is joined, the least first; None for never.
Best = Callable[[str, str], float | None]
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


def build_tokenizer(metadata: GGUFMetadata, notes: list[str]) -> PreTrainedTokenizerFast:
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
    if kind not in ("gpt2", "llama"):
        raise SlimError(
            f"the GGUF file has a tokenizer of type {kind!r}, expected 'gpt2' or 'llama'",
            _HINT,
        )
    if not tokens:
        raise _lacks("tokens", metadata)
    if twice := len(tokens) - len(set(tokens)):
        notes.append(f"{twice:,} tokens stand twice in the file: one id of each is never used")
    types = _types(metadata, tokens)
    metadata = _valid_ids(metadata, tokens, notes)
    with library_errors("the tokenizer cannot be rebuilt from the GGUF file", _HINT):
        if kind == "gpt2":
            tokenizer, best = _bpe(metadata, tokens, types, notes)
        else:
            tokenizer, best = _spm(metadata, tokens, types)
        controls = _add_special_tokens(tokenizer, metadata, tokens, types)
        _add_post_processor(tokenizer, metadata, tokens, kind)
        names = {
            f"{role}_token": tokens[index]
            for role, key in _ROLES.items()
            if (index := _id(metadata, key)) is not None
        }
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
        )
        check_rebuilt(fast, tokens, controls, best)
    if fast.eos_token is None:
        notes.append("the file names no end token: texts made with it do not end by themselves")
    fast.chat_template = _template(metadata)
    if fast.chat_template is None:
        notes.append("the file has no chat template: it cannot chat, and rows are read as text")
    if context := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        fast.model_max_length = int(context)
    return fast


def _id(metadata: GGUFMetadata, role: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return None if value is None else int(value)


def _types(metadata: GGUFMetadata, tokens: list[str]) -> list[int]:
    """Return what kind of token each is; without it control tokens would be cut into letters."""
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        raise _lacks("token_type", metadata)
    if len(types) != len(tokens):
        raise SlimError(f"the GGUF file has {len(tokens):,} tokens but {len(types):,} types", _HINT)
    return [int(kind) for kind in types]


def _lacks(key: str, metadata: GGUFMetadata) -> SlimError:
    kind = metadata["tokenizer.ggml.model"]
    return SlimError(
        f"the GGUF file has no tokenizer.ggml.{key}, which a tokenizer of type {kind!r} needs",
        "the file is incomplete: use another one, or convert the Hugging Face folder",
    )


def _valid_ids(metadata: GGUFMetadata, tokens: list[str], notes: list[str]) -> GGUFMetadata:
    """Return the metadata without ids that are no token's, where nothing hangs on them."""
    checked = dict(metadata)
    for key in _SPECIAL:
        index = _id(metadata, key)
        if index is None or index < len(tokens):
            continue
        if key in ("bos", "eos", "eot"):
            raise SlimError(
                f"the GGUF file's tokenizer.ggml.{key}_token_id is {index}, it has "
                f"{len(tokens):,} tokens",
                _HINT,
            )
        del checked[f"tokenizer.ggml.{key}_token_id"]
        notes.append(f"tokenizer.ggml.{key}_token_id is {index}, no token's: left out")
    return checked


def _template(metadata: GGUFMetadata) -> str | dict[str, str] | None:
    """Return the chat template, or all of them by name where there are several."""
    default = metadata.get(TEMPLATE)
    named = {
        key.removeprefix(f"{TEMPLATE}."): value
        for key, value in metadata.items()
        if key.startswith(f"{TEMPLATE}.")
    }
    for name, value in named.items():
        if not isinstance(value, str):
            raise SlimError(f"the GGUF file's chat template {name!r} is not text", _HINT)
    if not named:
        return default
    return {**({} if default is None else {"default": default}), **named}


def _bpe(
    metadata: GGUFMetadata, tokens: list[str], types: list[int], notes: list[str]
) -> tuple[Tokenizer, Best]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        pre = "gpt-2"
        notes.append("the file names no pre-tokenizer: GPT-2's is assumed")
    if pre not in PRE_TOKENIZERS:
        raise SlimError(
            f"the pre-tokenizer {pre!r} of the GGUF file is not supported",
            f"{did_you_mean(pre, PRE_TOKENIZERS)}; or convert the original Hugging Face folder",
        )
    cut = PRE_TOKENIZERS[pre]
    merges = _read_merges(metadata, tokens, types, notes)
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
    ranks = {merge: rank for rank, merge in reversed(list(enumerate(merges)))}
    return tokenizer, lambda left, right: ranks.get((left, right))


def _read_merges(
    metadata: GGUFMetadata, tokens: list[str], types: list[int], notes: list[str]
) -> list[tuple[str, str]]:
    """Return the merges; refuse a list from which the longer tokens cannot be made."""
    lines = metadata.get("tokenizer.ggml.merges", [])
    for merge in lines:
        if not isinstance(merge, str) or merge.count(" ") != 1:
            raise SlimError(f"the GGUF file's merge {merge!r} is not a pair of tokens", _HINT)
    merges: list[tuple[str, str]] = [tuple(merge.split(" ")) for merge in lines]
    longer = [t for t, kind in zip(tokens, types, strict=True) if kind == _NORMAL and len(t) > 1]
    merged = {left + right for left, right in merges}
    unmade = [token for token in longer if token not in merged]
    if unmade and not merges:
        raise _lacks("merges", metadata)
    if len(unmade) > len(longer) / 100:
        raise SlimError(
            f"the GGUF file's merges do not produce {len(unmade):,} of its {len(longer):,} longer "
            f"tokens, such as {unmade[0]!r}",
            "the file is incomplete: use another one, or convert the Hugging Face folder",
        )
    if unmade:
        notes.append(f"no merge makes {len(unmade):,} tokens, such as {unmade[0]!r}")
    return merges


def _spm(metadata: GGUFMetadata, tokens: list[str], types: list[int]) -> tuple[Tokenizer, Best]:
    """SentencePiece BPE: pieces are merged best score first, unknown characters become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None:
        raise _lacks("scores", metadata)
    if len(scores) != len(tokens):
        raise SlimError(
            f"the GGUF file has {len(tokens):,} tokens and the scores of {len(scores):,}", _HINT
        )
    pieces = [i for i, kind in enumerate(types) if kind == _NORMAL and len(tokens[i]) > 1]
    if len(pieces) > 1 and len({float(scores[i]) for i in pieces}) == 1:
        raise SlimError("the GGUF file's scores are all equal and give no order of merges", _HINT)
    unknown = _id(metadata, "unknown")
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocab.setdefault(token, index)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(tokens, types, scores, vocab),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("▁")] if space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(content=" ", left=1)] if space else []
    tokenizer.decoder = decoders.Sequence([*steps, *strip])

    def best(left: str, right: str) -> float | None:
        index = vocab.get(left + right)
        return None if index is None else -float(scores[index])

    return tokenizer, best


def _merges(
    tokens: list[str], types: list[int], scores: Any, vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece, best score of the result first."""
    plain = {token for token, kind in zip(tokens, types, strict=True) if kind in (_NORMAL, _UNUSED)}
    ranked = [
        (-float(scores[vocab[token]]), vocab[token[:cut]], token[:cut], token[cut:])
        for token in plain
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    return [(left, right) for _, _, left, right in sorted(ranked)]


def _add_special_tokens(
    tokenizer: Tokenizer, metadata: GGUFMetadata, tokens: list[str], types: list[int]
) -> list[int]:
    """Make control tokens and the user's own known; return the ids of the control tokens."""
    from tokenizers import AddedToken

    special = {index for role in _SPECIAL if (index := _id(metadata, role)) is not None}
    user = set()
    for index, kind in enumerate(types):
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
    return sorted(special)


def _add_post_processor(
    tokenizer: Tokenizer, metadata: GGUFMetadata, tokens: list[str], kind: str
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
