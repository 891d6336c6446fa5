"""What others wrote, read within bounds: regular files, JSON, and single values of it.

Invariant: before a library sees a file it is known to be a regular one (opening a FIFO would wait
for ever), no larger than its limit, and its JSON no deeper than ``MAX_DEPTH``, without integers of
thousands of digits and without half characters; what is refused, and what a library raises all the
same, is one line that names file and key. Try it: ``mlx-slim generate FOLDER --prompt Hello`` where
``config.json`` holds a list.

* ``open_regular``, ``read_bytes``, ``read_text``: files;
* ``parse_json``, ``read_json``, ``read_object``: JSON, and objects that must have certain keys;
* ``check_depth``: the same bound for values that another parser made (YAML, Parquet);
* ``field``: one value of an object, by type and range; ``check_fields``: values deep inside;
* ``library_errors``: around the call of a library.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from mlx_slim.errors import SlimError

# An object whose keys this package does not decide: another tool's file (``tokenizer.json``, an
# adapter's settings), a user's row, variables of a chat template; or one on its way to a file, as
# a record's ``as_json`` gives it. A structure that is known is a frozen record instead.
JsonObject = dict[str, Any]
# A model's ``config.json``: its architecture decides the keys, and all of them are carried along.
ModelConfig = dict[str, Any]
# A turn of a conversation: ``role``, ``content`` and whatever else a model's chat template reads.
ChatMessage = dict[str, Any]
# Metadata of a GGUF file: its writer and its architecture decide the keys; lists are arrays.
GGUFMetadata = dict[str, Any]

MAX_BYTES = 256 << 20  # of a file that is read as a whole; the largest tokenizers have 40 MB
MAX_DEPTH = 64  # objects and lists inside one another
MAX_DIGITS = 64  # of an integer; transformers itself writes one of 31 (model_max_length)
_AGAIN = "download or copy it again"
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half a character
_SHORT = 120
_REQUIRED = object()
_NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def shown(value: Any) -> str:
    """Return ``value`` for a message: its repr, shortened."""
    return " ".join(_repr.repr(value).split())


def short(path: Path | str) -> str:
    """Return a path for a message: one of 5,000 characters would hide what is wrong with it."""
    text = str(path)
    return text if len(text) <= 3 * _SHORT else f"{text[:_SHORT]}…{text[-_SHORT:]}"


def one_line(error: BaseException) -> str:
    """Return an error in one line, with its type where the text alone says little."""
    text = " ".join(str(error).split())[:300]
    plain = isinstance(error, (ValueError, RuntimeError)) and not isinstance(error, RecursionError)
    return text if plain and text else f"{type(error).__name__} {text}".strip()


@contextlib.contextmanager
def library_errors(what: str, hint: str = _AGAIN) -> Iterator[None]:
    """Turn whatever a library raises about bad input into one line.

    Args:
        what: The message up to the library's own words: names the file.
        hint: What to do.

    Raises:
        SlimError: For any error of the block; a SlimError passes as it is.
    """
    try:
        yield
    except SlimError:
        raise
    except Exception as error:
        raise SlimError(f"{what}: {one_line(error)}", hint) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a Rust library's, which is no Exception
            raise
        raise SlimError(f"{what}: {one_line(error)}", hint) from error


# -------------------------------------------------------------------------------------- files


def exists(path: Path) -> bool:
    """Return whether ``path`` leads to anything.

    Raises:
        SlimError: If it cannot be: a name that is too long, a loop of links, a folder that may not
            be entered.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return True


def open_regular(path: Path, limit: int | None = None) -> BinaryIO:
    """Open a regular file for reading; never waits for a writer.

    Args:
        path: The file; links are followed.
        limit: Most bytes that it may have.

    Raises:
        SlimError: If it is absent, too large, no regular file, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            kind = next((name for test, name in _KINDS if test(about.st_mode)), "no file")
            raise SlimError(f"{short(path)} is {kind}, expected a regular file", _AGAIN)
        if limit is not None and about.st_size > limit:
            raise SlimError(
                f"{short(path)} has {about.st_size:,} bytes, expected at most {limit:,}", _AGAIN
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _unreadable(path: Path, error: OSError | ValueError) -> SlimError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT:
        return SlimError(f"{short(path)} does not exist")
    if number == errno.ENXIO:
        return SlimError(f"{short(path)} is a socket, expected a regular file", _AGAIN)
    if number == errno.ENAMETOOLONG:
        return SlimError(f"{short(path)} cannot be read: a name of {len(str(path)):,} characters")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return SlimError(f"{short(path)} cannot be read: {reason}")


def no_such_name(error: OSError) -> SlimError | None:
    """Return the refusal of a name that no file can have, or that only leads to itself.

    Args:
        error: Of any look at a path; None is returned for errors of another kind.
    """
    if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP) or error.filename is None:
        return None
    return _unreadable(Path(os.fsdecode(error.filename)), error)


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        SlimError: As ``open_regular``.
    """
    with open_regular(path, limit) as handle:
        try:
            return handle.read()
        except OSError as error:
            raise _unreadable(path, error) from error


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """Return the text of a regular file in UTF-8.

    Raises:
        SlimError: As ``open_regular``; if it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SlimError(
            f"{short(path)} is not UTF-8: {error.reason} at byte {error.start}"
        ) from error


# --------------------------------------------------------------------------------------- JSON


def parse_json(text: bytes | str, where: str, *, unique: bool = False, halves: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: UTF-8, or decoded.
        where: Begins the message: a file, or a file and a line.
        unique: Refuse an object that has a key twice; else the last one counts.
        halves: Allow halves of characters (lone surrogates), which cannot be written as UTF-8.

    Raises:
        SlimError: If it is no JSON, deeper than ``MAX_DEPTH``, or holds an integer of more than
            ``MAX_DIGITS`` digits or half a character.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_once if unique else None)
        if text.count("[") + text.count("{") > MAX_DEPTH:  # else it cannot be deeper
            check_depth(value, where)
        if not halves and _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise _deep(where) from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise SlimError(f"{where} cannot be read as JSON: {half} is half of a character") from error
    except ValueError as error:
        raise SlimError(f"{where} cannot be read as JSON: {error}") from error
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text):,} digits, expected at most {MAX_DIGITS}")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> JsonObject:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(k for k in keys if keys.count(k) > 1))} twice")
    return values


def check_depth(value: Any, where: str, limit: int = MAX_DEPTH) -> None:
    """Refuse objects and lists that are nested deeper than ``limit``.

    Raises:
        SlimError: Names ``where``.
    """
    level: list[Any] = [[value]]
    for _ in range(limit + 1):
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) in (dict, list)
        ]
        if not level:
            return
    raise _deep(where, limit)


def _deep(where: str, limit: int = MAX_DEPTH) -> SlimError:
    return SlimError(f"{where} is nested deeper than {limit} levels", _AGAIN)


def read_json(path: Path, *, unique: bool = False) -> Any:
    """Return the JSON value of a file.

    Raises:
        SlimError: As ``open_regular`` and ``parse_json``.
    """
    return parse_json(read_bytes(path), short(path), unique=unique)


def read_object(path: Path, **kinds: type) -> JsonObject:
    """Return the JSON object of a file.

    Args:
        path: The file.
        kinds: Keys that it must have, and the type of each (see ``field``).

    Raises:
        SlimError: As ``read_json``; if it is no object, lacks a key, or a value is no such type.
    """
    value = read_json(path)
    if type(value) is not dict:
        raise SlimError(f"{short(path)} is not a JSON object: {shown(value)}", _AGAIN)
    for key, kind in kinds.items():
        field(value, short(path), key, kind)
    return value


def field(
    values: Mapping[str, Any],
    where: str,
    key: str,
    kind: type,
    default: Any = _REQUIRED,
    *,
    of: type | None = None,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """Return ``values[key]``, checked.

    Args:
        values: An object.
        where: Begins the message: the file.
        key: The key; null counts as absent where there is a default.
        kind: ``int``, ``float`` (integers too; never NaN or infinite), ``str``, ``bool``, ``dict``
            or ``list``. True is no integer.
        default: What an absent value gives; without one the key is required.
        of: Type of every value in a list or an object.
        low: Least value of a number, or least length.
        high: Largest value of a number, or largest length.
        below: A number that the value is smaller than.

    Raises:
        SlimError: Names the key, the value and what was expected.
    """
    if default is not _REQUIRED and values.get(key) is None:
        return default
    if key not in values:
        raise SlimError(f"{where} has no {key!r}: expected {_NAMES[kind]}", _AGAIN)
    value = cast(Any, values[key])
    fits = _is(value, kind)
    if fits and of is not None:
        for name, one in value.items() if kind is dict else enumerate(value):
            if not _is(one, of):
                place = f"{key}[{shown(name)}]"
                text = f"{where}: {place} is {shown(one)}, expected {_NAMES[of]}"
                raise SlimError(text, _AGAIN)
    if fits:
        size = value if kind in (int, float) else len(value) if kind in (str, dict, list) else 0
        fits = (low is None or size >= low) and (high is None or size <= high)
        fits = fits and (below is None or size < below)
    if not fits:
        span = "" if low is None else f" from {low:,}"
        span += "" if high is None else f" to {high:,}"
        span += "" if below is None else f" to below {below:,}"
        what = _NAMES[kind] + span
        raise SlimError(f"{where}: {key} is {shown(value)}, expected {what}", _AGAIN)
    return value


def check_fields(values: Mapping[str, Any], where: str, kinds: Mapping[str, type]) -> None:
    """Check values inside an object, by their dotted keys; ``*`` is every element.

    Args:
        values: An object.
        where: Begins the message: the file.
        kinds: Dotted key -> its type: ``{"result.done.step": int, "sources.*.path": str}``.

    Raises:
        SlimError: Names the first key that is missing or of another type (see ``field``).
    """
    for path, kind in kinds.items():
        _check_inside(values, where, path.split("."), kind)


def _check_inside(values: Mapping[str, Any], where: str, path: list[str], kind: type) -> None:
    key, *rest = path
    if not rest:
        field(values, where, key, kind)
        return
    if rest[0] != "*":
        _check_inside(field(values, where, key, dict), f"{where}: {key}", rest, kind)
        return
    many = field(values, where, key, list if type(values.get(key)) is list else dict)
    for name, one in many.items() if type(many) is dict else enumerate(many):
        place = f"{key}[{shown(name)}]"
        _check_inside({place: one}, where, [place, *rest[1:]], kind)


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is kind
