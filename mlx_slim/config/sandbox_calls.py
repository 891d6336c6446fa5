"""What a template may call, and how large the result can become: ``sandbox.py``'s table of costs.

Invariant: a method of a built-in type that is not listed here is refused; a filter or method whose
result can be much larger than what it is given, or that takes more than linear time, has its size
computed before it runs. Filters that make no prompt and have no bound (``urlize``, ``pprint``,
``random``…) do not exist.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from types import BuiltinMethodType, GeneratorType, MethodType
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.utils import Cycler, Joiner, Namespace

from mlx_slim.config.sandbox_budget import TooMuch, budget

_WIDEST = 100_000  # the largest whole number that a filter or a method of a text takes
_WIDEST_INDENT = 100
_MOST_WORK = 1 << 26  # comparisons of characters, where time is a product of two lengths
_ABSENT_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_NUMBER = re.compile(r"\d+")
_NESTED = re.compile(r"\{[^}]*\{")  # "{:{width}}"
_NAMED = re.compile(r"%\(|\{[^}:!]")  # "%(name)s", "{0}"
_QUOTED = re.compile(r"%[^a-zA-Z]*[ra]|![ra]")  # "%r", "{!r}": a character takes up to 10
_PRODUCTS = {"strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"}
_SPLITS = {"split", "rsplit", "splitlines", "list"}
_TEXT_METHODS = (
    "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii "
    "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join "
    "ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_TEXT_METHODS.split()),
    list: frozenset(("index", "count", "copy")),
    tuple: frozenset(("index", "count")),
    dict: frozenset(("get", "items", "keys", "values", "copy")),
    int: frozenset(("bit_length", "bit_count", "conjugate", "is_integer")),
    float: frozenset(("is_integer", "hex", "conjugate")),
    range: frozenset(("index", "count")),
}


# ------------------------------------------------------------------------------ sizes of results


def size_of_operation(operator: str, left: Any, right: Any) -> int:
    """Return the characters, items or digits that ``left operator right`` can have."""
    sizes = budget().size(left), budget().size(right)
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(many, str | list | tuple):
                return budget().size(many) * max(times, 0)
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right)
    if operator == "%" and isinstance(left, str):
        return size_of_format(left, (right,))
    return sum(sizes)


def size_of_format(template: str, values: tuple[Any, ...]) -> int:
    """Return the characters that a format can have: widths as they stand, or as they are given."""
    fields = template.count("%") + template.count("{")
    widths = sum(int(digits[:9]) for digits in _NUMBER.findall(template))
    if "*" in template or _NESTED.search(template):  # widths that are values
        widths += fields * max((abs(value) for value in _numbers(values)), default=0)
    again = fields if _NAMED.search(template) else 1  # a value may be written that often
    plain = all(isinstance(value, str) for value in values) and not _QUOTED.search(template)
    output_size = budget().size(list(values)) * (1 if plain else 10)
    return len(template) + widths + max(again, 1) * output_size


def _numbers(values: Any) -> list[int]:
    if isinstance(values, bool):
        return []
    if isinstance(values, int):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    inner = values if isinstance(values, list | tuple) else []
    return [number for value in inner for number in _numbers(value)]


def _size_of_replace(text: str, old: str, new: str, *_: Any) -> int:
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _check_product(name: str, text: str, args: tuple[Any, ...]) -> None:
    """Refuse a search from the end, or a strip, whose time is the product of both lengths."""
    longest = max((len(arg) for arg in args if isinstance(arg, str)), default=0)
    if len(text) * longest > _MOST_WORK:
        raise TooMuch(f"{name} of {longest} characters in a text of {len(text)} takes too long")


def _check_widths(name: str, args: Any) -> None:
    for arg in args:
        if isinstance(arg, int) and abs(arg) > _WIDEST:
            raise TooMuch(f"{name}({arg}): at most {_WIDEST}")


def _size_of_method(name: str, text: str, args: tuple[Any, ...]) -> int:
    if name == "replace" and len(args) > 1:
        return _size_of_replace(str(text), str(args[0]), str(args[1]))
    if name == "join" and args:
        return _size_of_join(args[0], len(text))
    if name == "expandtabs":
        return len(text) + text.count("\t") * int(args[0] if args else 8)
    return len(text) + sum(arg for arg in args if isinstance(arg, int) and arg > 0)


def _size_of_join(values: Any, separator: int) -> int:
    items = len(values) if isinstance(values, str | list | tuple | dict) else 0
    return budget().size(values) + items * separator


# --------------------------------------------------------------------------------------- calls


def before_call(
    called: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, tuple[Any, ...]]:
    """Refuse a call that templates may not make, or whose result could be too large.

    Returns:
        Bytes that an item of its result takes, and its arguments (generators read into lists).
    """
    owner = getattr(called, "__self__", None)
    if not isinstance(called, BuiltinMethodType | MethodType) or owner is None:
        return 16, args
    for kind, names in _METHODS.items():
        if isinstance(owner, kind):
            name = called.__name__
            if name not in names:
                raise SecurityError(f"templates may not call {kind.__name__}.{name}")
            break
    else:
        if isinstance(called, BuiltinMethodType):
            raise SecurityError(f"templates may not call {type(owner).__name__}.{called.__name__}")
        return 16, args
    if not isinstance(owner, str):
        return 16, args
    args = tuple(list(a) if isinstance(a, GeneratorType) else a for a in args)
    every = (*args, *kwargs.values())
    _check_widths(name, every)
    if name in _PRODUCTS:
        _check_product(name, owner, every)
    budget().reserve(_size_of_method(name, owner, every), "a text")
    return (80 if name in _SPLITS else 16), args


# -------------------------------------------------------------------------- filters and globals


def bounded_filters(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return Jinja's filters, each with its bound, and ``tojson`` as transformers has it."""
    allowed = {name: one for name, one in filters.items() if name not in _ABSENT_FILTERS}
    return {name: bounded(name, one) for name, one in (allowed | {"tojson": tojson}).items()}


def bounded_tests(tests: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return Jinja's tests, counted."""

    def counted(test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> Any:
            budget().step()
            return test(*args, **kwargs)

        return run

    return {name: counted(test) for name, test in tests.items()}


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that is counted, its size computed first where it can be large."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0
    free = name in ("default", "d", "min", "max", "sum", "abs", "float", "string", "int", "items")

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        used = budget()
        head, rest = args[:first], [*args[first:]]
        if name in ("join", "sum") and rest and isinstance(rest[0], GeneratorType):
            rest[0] = list(rest[0])
        for value in (*rest, *kwargs.values()):
            used.size(value)
            if isinstance(value, list | tuple | dict | range):
                used.step(len(value))
        if not free:
            _check_widths(name, (*rest[1:], *kwargs.values()))
        if (size := _size_of_filter(name, rest, kwargs)) is not None:
            used.reserve(size, "a value")
        text = bool(rest) and isinstance(rest[0], str)
        return used.count_value(function(*head, *rest, **kwargs), 80 if text else 16)

    return run


def _size_of_filter(name: str, args: list[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Return what a filter's result can have; None where it is about what it was given."""
    value = args[0] if args else ""
    more = (*args[1:], *kwargs.values())
    if name == "center":
        return len(str(value)) + sum(n for n in more if isinstance(n, int))
    if name == "indent":
        width = max([4, *(n if isinstance(n, int) else len(str(n)) for n in more)])
        return len(str(value)) + (len(str(value).splitlines()) + 1) * width
    if name == "replace" and len(args) > 2:
        return _size_of_replace(*(str(part) for part in args[:3]))
    if name == "join":
        return _size_of_join(value, max((len(str(part)) for part in more), default=0))
    if name == "format":
        return size_of_format(str(value), more)
    if name == "trim":
        _check_product(name, str(value), more)
    if name == "sum" and isinstance(value, list | tuple) and not _is_number(kwargs.get("start", 0)):
        return len(value) * budget().size(value)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers' chat templates expect it: nothing escaped for HTML."""
    encoder = functools.partial(
        json.JSONEncoder,
        ensure_ascii=ensure_ascii,
        separators=separators,
        sort_keys=sort_keys,
    )
    if indent is None and separators is None:
        return encoder().encode(value)
    if (len(indent) if isinstance(indent, str) else indent or 0) > _WIDEST_INDENT:
        raise TooMuch(f"tojson(indent={indent}): at most {_WIDEST_INDENT}")
    pieces: list[str] = []  # one by one, because an indent can be much longer than the value
    for part in encoder(indent=indent).iterencode(value):
        budget().step(0, len(part))
        pieces.append(part)
    return "".join(pieces)


class _TemplateDict:
    """``dict`` of chat templates, without a class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return a dictionary of these keys."""
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """``namespace`` of chat templates: no names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no name that begins with an underscore: {name!r}")


def _range(*args: int) -> range:
    values = range(*args)
    if not -_WIDEST <= len(values) <= _WIDEST:
        raise TooMuch(f"range of {len(values)} numbers: at most {_WIDEST}")
    return values


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    budget().reserve(256 * len(form), "a date")
    return datetime.now().strftime(form)


def bounded_globals() -> dict[str, object]:
    """Return the functions that templates may use: those of transformers' chat templates."""
    return {
        "range": _range,
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
        "cycler": Cycler,
        "joiner": Joiner,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
