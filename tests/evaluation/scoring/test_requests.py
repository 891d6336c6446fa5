"""The encoding rules of the reference harness, pinned one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring.requests import Request, RequestEncoder, common_prefix, max_length
from tests.support.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("plain")
    byte_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bos")
    byte_tokenizer(folder, bos=True)
    return load_tokenizer(folder)


def _text(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(list(ids))


def test_trailing_space_moves_to_the_continuation(plain: Any) -> None:
    request = RequestEncoder(plain, 100).request("Answer: \n ", "yes")
    assert _text(plain, request.ids[: request.start]) == "Answer:"
    assert _text(plain, request.ids[request.start :]) == " \n yes"


def test_bos_comes_once_and_only_from_a_tokenizer_that_adds_it(plain: Any, with_bos: Any) -> None:
    assert plain.bos_token_id not in RequestEncoder(plain, 100).request("a", " b").ids
    request = RequestEncoder(with_bos, 100).request("a", " b")
    assert request.ids.count(with_bos.bos_token_id) == 1
    assert request.ids[0] == with_bos.bos_token_id
    assert request.start == 2
    templated = RequestEncoder(with_bos, 100, chat=True).request("a", " b")
    assert with_bos.bos_token_id not in templated.ids


@pytest.mark.parametrize("context", ["", "  "])
def test_an_empty_context_is_one_bos(plain: Any, with_bos: Any, context: str) -> None:
    for tokenizer in (plain, with_bos):
        request = RequestEncoder(tokenizer, 100).request(context, "yes")
        assert request.start == 1
        assert request.ids[0] == tokenizer.bos_token_id
        assert request.ids.count(tokenizer.bos_token_id) == 1
        assert _text(tokenizer, request.ids[1:]) == f"{context}yes"


def test_a_closing_eos_is_no_part_of_the_continuation(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    byte_tokenizer(tmp_path)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", 257), ("<|im_end|>", 258)],
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a")[-1] == 258
    request = RequestEncoder(tokenizer, 100).request("a", "b")
    assert [request.ids[0], len(request.ids), request.start] == [257, 3, 2]
    assert _text(tokenizer, request.ids[2:]) == "b"


def test_a_continuation_without_tokens_is_refused(plain: Any, tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="the continuation '' of 'Answer:' has no tokens to score"):
        RequestEncoder(plain, 100).request("Answer:", "")
    byte_tokenizer(tmp_path)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.normalizer = normalizers.Replace("~", "")  # a text that this tokenizer does not see
    raw.save(str(tmp_path / "tokenizer.json"))
    encoder = RequestEncoder(load_tokenizer(tmp_path), 100)
    for context in ("Answer:", ""):
        with pytest.raises(SlimError, match=r"the continuation '~~' .*has no tokens to score"):
            encoder.request(context, "~~")
    assert encoder.request("Answer:", "~y").start == len("Answer:")


class _Merging:
    """A tokenizer that joins "a" and "b" across the border: the context is no token prefix."""

    bos_token_id, eos_token_id = None, 9

    def __init__(self) -> None:
        vocab = {"a": 0, "b": 1, "ab": 2, "c": 3}
        self._raw = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
        self._raw.pre_tokenizer = pre_tokenizers.Whitespace()

    def encode(self, text: str, **_: object) -> list[int]:
        return self._raw.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._raw.decode(ids)


def test_a_merge_across_the_border_is_cut_by_length() -> None:
    # context "c a" is [3, 0], the whole "c ab" is [3, 2]: nothing is left after two ids, so the
    # last one is scored; with "bc" the harness's cut by length leaves [3].
    merging: Any = _Merging()
    encoder = RequestEncoder(merging, 100)
    assert encoder.request("c a", "b") == Request((3, 2), 1)
    assert encoder.request("c a", "b c") == Request((3, 2, 3), 2)


def test_left_truncation_keeps_the_continuation_and_is_counted(plain: Any) -> None:
    encoder = RequestEncoder(plain, 10)
    whole = encoder.request("0123456", "xyz")  # 9 ids are read, 1 more is predicted
    assert (len(whole.ids), encoder.truncated) == (10, 0)
    assert len(encoder.request("01234567", "xyz").ids) == 11
    assert encoder.truncated == 0
    cut = encoder.request("0123456789", "xyz")
    assert _text(plain, cut.ids) == "23456789xyz"
    assert _text(plain, cut.ids[cut.start :]) == "xyz"
    assert len(cut.inputs) == 10
    assert encoder.truncated == 1
    with pytest.raises(SlimError, match="12 tokens, the model reads 10"):
        encoder.request("q", "x" * 12)
    with pytest.raises(SlimError, match="no tokens to score"):
        encoder.request("", "")


def test_a_prompt_leaves_room_for_the_answer(plain: Any) -> None:
    encoder = RequestEncoder(plain, 10)
    assert _text(plain, encoder.prompt("abcdefgh", 4)) == "cdefgh"
    assert encoder.truncated == 1
    assert encoder.prompt("", 4) == [plain.bos_token_id]
    with pytest.raises(SlimError, match="no room for a prompt in 10"):
        encoder.prompt("abc", 10)


def test_the_longest_input_comes_from_config_or_tokenizer(plain: Any) -> None:
    assert max_length({"max_position_embeddings": 77}, plain) == 77
    assert max_length({"text_config": {"n_ctx": 5}}, plain) == 5
    assert max_length({}, plain) == 512
    merging: Any = _Merging()
    assert max_length({"max_position_embeddings": None}, merging) == 2048


def test_common_prefix_is_of_inputs() -> None:
    requests = [Request((1, 2, 3, 4), 3), Request((1, 2, 3, 5), 3), Request((1, 2, 3), 2)]
    assert common_prefix(requests) == (1, 2)
    assert common_prefix(requests[:2]) == (1, 2, 3)
    assert common_prefix([]) == ()


def test_text_that_begins_with_bos_gets_no_other(with_bos: Any) -> None:
    bos = with_bos.bos_token
    encoder = RequestEncoder(with_bos, 100)
    request = encoder.request(f"{bos}a", " b")
    assert request.ids == encoder.request("a", " b").ids
    assert encoder.prompt(f"{bos}a", 1) == encoder.prompt("a", 1)


def test_a_context_is_encoded_once_for_its_choices(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = RequestEncoder(plain, 100)
    fresh = [
        RequestEncoder(plain, 100).request(q, c) for q in "xy" for c in (" A", " B", " C", " D")
    ]
    texts = []
    encode = encoder._ids
    monkeypatch.setattr(encoder, "_ids", lambda text: texts.append(text) or encode(text))
    again = [encoder.request(q, c) for q in "xy" for c in (" A", " B", " C", " D")]
    assert again == fresh
    assert texts.count("x") == texts.count("y") == 1
    assert len(texts) == 2 * (1 + 4)


def test_a_document_has_the_bos_that_its_tokenizer_adds(plain: Any, with_bos: Any) -> None:
    assert list(RequestEncoder(plain, 100).document("ab")) == plain.encode("ab")
    ids = RequestEncoder(with_bos, 100).document("ab")
    assert (ids[0], len(ids)) == (with_bos.bos_token_id, 3)
