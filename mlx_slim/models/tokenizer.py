"""A tokenizer meets its model: which ids have an embedding, and which token ends a text.

Invariant: an id without a row in the embedding never reaches a model, which would compute garbage
from it without a word: a tokenizer that gives one for every text is refused here, and others carry
``embedding_rows``, by which texts are checked where they are tokenized (``data/tokenize.py``). Try
it: ``mlx-slim generate FOLDER --prompt Hello`` with another model's ``tokenizer.json`` in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlx_slim.errors import SlimError
from mlx_slim.models.tensors import few
from mlx_slim.reading import JsonObject, ModelConfig

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Texts full of traps, on which tokenizers are compared.
PROBES = (
    "Hello world, it's 12345 o'clock; don't SHOUT'S!",
    "  two  spaces\n\n2 lines\t\ttabs \n \n",
    "naïve café Größe — “quotes” … 你好，世界 ١٢٣ 🙂👍🏽",
    "def f(x_1):\n    return x_1**2  # 3.14e-10\r\n",
    "e\u0301 vs é; ½ ² Ⅷ; a\u00a0b",
    "",
    " leading",
)


def fit_tokenizer(tokenizer: TokenizerWrapper, config: ModelConfig, where: str) -> list[str]:
    """Complete a tokenizer from its model's config, and check that they match.

    Args:
        tokenizer: mlx-lm's wrapper; the Hugging Face tokenizer inside may get an end token, and
            ``embedding_rows`` where it knows tokens that the model does not.
        config: The model's, normalised.
        where: The folder, for messages.

    Returns:
        What a person should know, a line each.

    Raises:
        SlimError: If a token that every text would hold has no embedding.
    """
    inner: Any = tokenizer._tokenizer
    vocabulary: dict[str, int] = inner.get_vocab()
    notes = _end(inner, vocabulary, config)
    rows = embedding_rows(config)
    if rows is None or max(vocabulary.values(), default=0) < rows:
        return notes
    outside = {token: index for token, index in vocabulary.items() if index >= rows}
    for what, token in _always(inner, outside):
        raise SlimError(
            f"{where}: {what} {token!r} has the id {outside[token]}, the model's embedding has "
            f"{rows:,} rows",
            "use this model's own tokenizer files, or the model that this tokenizer belongs to",
        )
    inner.embedding_rows = rows
    names = few([repr(token) for token in sorted(outside, key=lambda token: outside[token])])
    notes.append(
        f"{len(outside):,} tokens of the tokenizer have no row in the embedding of {rows:,} rows "
        f"({names}): a text that holds one is refused"
    )
    return notes


def description(tokenizer: Any) -> JsonObject:
    """Return what a copy of a tokenizer must do alike, by name; the values are compared only.

    Args:
        tokenizer: mlx-lm's wrapper, or a Hugging Face tokenizer.
    """
    inner: Any = getattr(tokenizer, "_tokenizer", None)
    inner = inner if hasattr(inner, "apply_chat_template") else tokenizer
    ids = {text: inner.encode(text) for text in PROBES}
    return {
        "vocabulary": inner.get_vocab(),
        "begin and end token": (inner.bos_token_id, inner.eos_token_id),
        "chat template": inner.chat_template,
        **{f"ids of {text[:20]!r}": token_ids for text, token_ids in ids.items()},
        **{f"text of {text[:20]!r}": inner.decode(token_ids) for text, token_ids in ids.items()},
    }


def keep_within(tokenizer: TokenizerWrapper, configs: Iterable[ModelConfig]) -> None:
    """Let texts be checked against the smallest embedding of several models that read them.

    Args:
        tokenizer: Speaks for all of them.
        configs: Theirs, normalised.
    """
    inner: Any = tokenizer._tokenizer
    least = min((rows for config in configs if (rows := embedding_rows(config))), default=None)
    if least is not None and max(inner.get_vocab().values(), default=0) >= least:
        inner.embedding_rows = least


def embedding_rows(config: ModelConfig) -> int | None:
    """Return the rows of the embedding that a config describes; None if it does not say."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(part.get("vocab_size"), int):
            return part["vocab_size"]
    return None


def vocabulary_size(config: ModelConfig) -> int:
    """Return the tokens that a model gives logits for; of one that sees pictures, its text part's.

    Raises:
        SlimError: If the config does not say it.
    """
    rows = embedding_rows(config)
    if rows is None:
        raise SlimError(
            f"config.json of a model of type {config.get('model_type')} has no vocab_size",
            "add it: the rows of the embedding",
        )
    return rows


def _end(inner: Any, vocabulary: dict[str, int], config: ModelConfig) -> list[str]:
    """Give a tokenizer without an end token the config's; return what to say."""
    if inner.eos_token_id is not None:
        return []
    configured = config.get("eos_token_id")
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    tokens = {index: token for token, index in vocabulary.items()}
    names = [tokens[index] for index in ids if index in tokens]
    if not names:
        return [
            "neither the tokenizer nor the config names an end token: answers do not learn to end"
        ]
    inner.eos_token = names[0]
    return [f"the tokenizer names no end token: the config's, {names[0]!r}, ends texts"]


def _always(inner: Any, outside: dict[str, int]) -> list[tuple[str, str]]:
    """Return the tokens of ``outside`` that every text would hold: (what it is, token)."""
    special = []
    if inner.eos_token in outside:
        special.append(("the end token", inner.eos_token))
    if inner.bos_token in outside and inner("a").input_ids[:1] == [inner.bos_token_id]:
        special.append(("the first token of every text", inner.bos_token))
    template = inner.chat_template
    sources = template.values() if isinstance(template, dict) else [template or ""]
    used = [token for token in outside if any(token in source for source in sources)]
    added = inner.get_added_vocab() if used else {}
    return special + [("the chat template's", token) for token in used if token in added]
