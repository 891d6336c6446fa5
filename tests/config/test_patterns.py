"""Regular expressions of users: what ``re`` makes of them, and an end to every search."""

from __future__ import annotations

import random
import re
import threading
import time
import warnings
from typing import Any

import pytest

from mlx_slim.config.patterns import compile_pattern
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.spec import list_tasks

# The harness's filters (gsm8k, MMLU-Pro, BBH, DROP, MATH), and what ``regex`` reads its own way.
PATTERNS = [
    r"#### (\-?[0-9\.\,]+)", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", r"answer is \(?([ABCDEFGHIJ])\)?",
    r".*[aA]nswer:\s*([A-J])", r"(?<=the answer is )(.*)(?=.)", r"\b(a|an|the)\b", r",", r"\$",
    r"(?s).*#### ", r"\.$", r"(?i)the best answer is ([A-D])", r"\\boxed{(.*)}", r"[^\w\s]",
    r"x{e}", r"x{e<=1}", r"foo{i}", r"{", r"a{}", r"a{,2}", r"\d{2", r"[[:alpha:]]", r"[]a]+",
    r"[^]a]+", r"[a&&b]+", r"[a~~b|]+", r"\w+", r"\W", r"[^\W_]+", r"[\W_]+", r"[^\W\da]+", r"\S+",
    r"[\s\w]+", r"\b\w", r"\B.", r"(?a)\w+", r"(?x) a b # c [ \n \w", r"(?#c[)x", r"\N{DIGIT ONE}",
    r"[\N{DIGIT ONE}x]", r"(?P<x>a)(?P=x)", r"(a)|b", r"(?m)^a$", r"\x41|\101|\u00e9", r"a*", r"",
]  # fmt: skip
TEXTS = [
    "The answer is (C). #### 1,234.50\nAnswer: B", "½ x² é नमस्ते 世界 ①", "a\nb\x1cc\x85d  e",
    "x{e} x{e<=1} foo{i} [:alpha:] a{}b a{,} {", r"\boxed{12} a&&b~~|c][", "the cat, an A. 11 $1",
]  # fmt: skip


def test_a_pattern_means_what_re_makes_of_it() -> None:
    separate = [filter_.pattern for task in list_tasks() for filter_ in task.spec.filters.values()]
    separate += [pattern for task in list_tasks() for pattern in task.spec.ignore]
    assert separate
    draw = random.Random(0)
    letters = "aA1 _-é½²न्\x1c\n[]{}()$.,#:&~|\\xe世"
    texts = TEXTS + ["".join(draw.choices(letters, k=draw.randrange(40))) for _ in range(100)]
    for source in PATTERNS + separate:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "possible nested set"
            pattern = compile_pattern(source)
        for text in texts:
            theirs = [(m.span(), m.groups()) for m in re.finditer(source, text)]
            assert [(m.span(), m.groups()) for m in pattern.matches(text)] == theirs, (source, text)
            assert pattern.replace(text, "_") == re.sub(source, "_", text)
            assert pattern.fullmatch(text) == bool(re.fullmatch(source, text))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("(", "missing \\)"),
        ("a**", "multiple repeat"),
        ("a" * 5000, "5000 characters, expected at most"),
        ("(?:" * 900 + "x" + ")" * 900, "nested too deeply"),
        ("a{1000000000}", "repeats groups more than"),
        ("(?:(?:a{1000}){1000}){1000}", "repeats groups more than"),
        ("[a-z]" * 200, "more than 100 sets"),
    ],
)
def test_a_pattern_that_cannot_be_compiled_is_one_line(source: Any, words: str) -> None:
    start = time.thread_time()
    with pytest.raises(ValueError, match=words) as caught:
        compile_pattern(source)
    assert "\n" not in str(caught.value)
    assert time.thread_time() - start < 1


@pytest.mark.parametrize(
    ("source", "text", "words"),
    [
        (r"(a|aa)+$", "a" * 60 + "b", "takes more than 1 s"),
        (r"(\w+\s?)*$", "word " * 5000 + "!", "takes more than 1 s"),
        ("(?i)" + "ß" * 3000, "s" * 60000, "too many to search"),  # no timeout reaches it
    ],
)
def test_a_search_ends_in_a_worker_thread_too(source: str, text: Any, words: str) -> None:
    raised: list[SlimError] = []

    def search() -> None:
        try:
            compile_pattern(source).matches(text)
        except SlimError as error:
            raised.append(error)

    thread = threading.Thread(target=search)
    start = time.process_time()
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert time.process_time() - start < 3
    assert re.search(words, raised[0].message)
