"""Words: the package uses the field's terms, one meaning a word, one class a name.

Refused in names, string literals and docstrings of ``mlx_slim/``: words of our own that a term of
the field has replaced (``REPLACED``). Refused in names, of tests too: participles and adjectives
where a noun would say what the value is (``VAGUE``). ``words_allowed.txt`` lists what stays, each
with its reason: ``name`` or ``text``, word, file (``*``: every file), reason, separated by tabs.
An entry that nothing uses fails. Try it: ``python -m pytest tests/test_words.py``.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ALLOWED = Path(__file__).parent / "words_allowed.txt"

# Word or phrase -> what to write instead.
REPLACED = {
    "course": "training strategy",
    "companion": "callback",
    "position": "train state",
    "lesson": "teacher query",
    "asked": "request",
    "written": "response",
    "saying": "teacher targets",
    "said": "teacher targets",
    "teach": "generate targets",
    "teaches": "generates targets",
    "study": "generate targets",
    "taught": "distillation dataset",
    "together": "mutual distillation",
    "held out": "validation, or forgetting",
    "anatomy": "structure",
    "tree": "prefix tree",
    "branches": "prefix cache",
    "shares": "loss weights, fractions or probabilities",
    "rule": "token loss",
    "slope": "logits gradient",
    "push": "label weight",
    "lane": "num_threads",
    "parts": "shards, metrics or chunks",
    "worst": "largest_batch",
    "rehearse": "profile_steps",
    "aware": "qat",
    "remat": "grad_checkpoint",
    "lie on": "stack on",
    "lies on": "stack on",
    "stand in": "fake quantize",
    "stands in": "fake quantize",
    "go on": "resume",
    "goes on": "resumes",
}
VAGUE = {
    "found",
    "known",
    "own",
    "given",
    "made",
    "said",
    "wanted",
    "kept",
    "worn",
    "lies",
    "share",
}
# Rooms that are still to be read: nothing of them is refused.
PENDING: set[str] = set()


class Use(NamedTuple):
    """A word in a file."""

    kind: str  # name or text
    word: str  # of a name: the whole name
    file: str
    line: int
    why: str  # the word or phrase that is refused


def _phrase(phrase: str) -> str:
    return r"[\W_]+".join(phrase.split()) + ("s?" if " " not in phrase else "")  # course, courses


_TEXT = re.compile(rf"(?<![a-zA-Z])(?:{'|'.join(map(_phrase, REPLACED))})(?![a-zA-Z])", re.I)
_IN_NAME = {word for word in REPLACED if " " not in word}
_ANOTHER_WORD = {"positions"}  # of tokens: a train state has no plural


def sources(top: str) -> list[Path]:
    return sorted((ROOT / top).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_pending(path: Path) -> bool:
    room = path.relative_to(ROOT).parts[1].removesuffix(".py")
    return room in PENDING or room.removeprefix("test_") in PENDING


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of the module, and of all that it defines."""
    yield 1, path.stem if path.stem != "__init__" else path.parent.name
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            if not node.name.startswith("test_"):  # the name of a test is a sentence
                yield node.lineno, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def words(name: str) -> list[str]:
    """Return the words of a name: ``SaidOnce_found_LV`` has said, once, found and lv."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def refused_in_name(name: str) -> str | None:
    inside = words(name)
    for word in inside:
        if word in _ANOTHER_WORD:
            continue
        if word in VAGUE | _IN_NAME or word.removesuffix("s") in _IN_NAME:
            return word
    return next((p for p in REPLACED if " " in p and p in " ".join(inside)), None)


def refused_uses() -> Iterator[Use]:
    for path in [*sources("mlx_slim"), *sources("tests")]:
        file = path.relative_to(ROOT).as_posix()
        if is_pending(path) or path == Path(__file__):
            continue
        for line, name in names(path):
            if why := refused_in_name(name):
                yield Use("name", name, file, line, why)
        if file.startswith("tests/"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for match in _TEXT.finditer(node.value):
                    word = " ".join(re.split(r"[\W_]+", match[0].lower()))
                    if word in _ANOTHER_WORD:
                        continue
                    line = node.lineno + node.value[: match.start()].count("\n")
                    yield Use("text", word, file, line, word)


def allowed() -> dict[tuple[str, str, str], str]:
    entries = {}
    for line in ALLOWED.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            kind, word, file, reason = line.split("\t")
            assert reason and kind in ("name", "text"), line
            assert (kind, word, file) not in entries, f"twice: {line}"
            entries[kind, word, file] = reason
    return entries


def test_the_fields_words() -> None:
    entries = allowed()
    used = set()
    offences = []
    for use in refused_uses():
        keys = [(use.kind, use.word, use.file), (use.kind, use.word, "*")]
        if key := next((key for key in keys if key in entries), None):
            used.add(key)
            continue
        instead = REPLACED.get(use.why, "a noun that says what it is")
        where = f"{use.file}:{use.line}"
        offences.append(f"{where}: {use.kind} {use.word!r} ({use.why}): write {instead}")
    offences += [
        f"words_allowed.txt: nothing needs {' '.join(key)!r}"
        for key in entries.keys() - used
        if key[2] == "*" or not (ROOT / key[2]).exists() or not is_pending(ROOT / key[2])
    ]
    assert not offences, "\n" + "\n".join(sorted(offences))


def test_one_class_name_stands_once() -> None:
    places = defaultdict(list)
    for path in sources("mlx_slim"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    offences = [
        f"{name}: {', '.join(path.relative_to(ROOT).as_posix() for path in paths)}"
        for name, paths in sorted(places.items())
        if len(paths) > 1 and not any(map(is_pending, paths))
    ]
    assert not offences, "\n" + "\n".join(offences)


def test_pending_rooms_exist() -> None:
    rooms = {path.stem for top in ("mlx_slim", "tests") for path in (ROOT / top).iterdir()}
    assert rooms >= PENDING, PENDING - rooms
