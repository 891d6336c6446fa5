"""What is wrong with a configuration file, in the words of its keys.

Invariant: every message names the full dotted key, the value seen, what is allowed and where the
value came from; the allowed range is read from the schema, so it cannot drift. Try it:
``mlx-slim plan tinyllama-lora trian.steps=3 train.clip=-1``.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mlx_slim.config.aliases import Aliases, Keys
from mlx_slim.config.layers import Origins
from mlx_slim.config.section import Section
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.reading import JsonObject

Checked = TypeVar("Checked", bound=Section)
_TYPES = {
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "a section of `key: value`",
}


def _number(schema: JsonObject) -> str:
    words = "a whole number" if schema["type"] == "integer" else "a number"
    bounds = [
        f"{text} {schema[key]:g}"
        for key, text in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in schema
    ]
    return f"{words} ({' and '.join(bounds)})" if bounds else words


def _origin(path: Keys, origins: Origins) -> str:
    """Where the value at ``path`` was last touched, else where the section around it was."""
    inner = [origin for key, origin in origins.items() if key[: len(path)] == path]
    while not inner and path:
        path = path[:-1]
        inner = [origins[path]] if path in origins else []
    return inner[-1] if inner else "recipe"


def _leaf_paths(value: Any, path: Keys) -> list[Keys]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaf_paths(item, (*path, key))]
    return [path]


def _locate(location: tuple[Any, ...], values: Any) -> tuple[Keys, Any]:
    """Return the key path of a pydantic location (which names union members too), and its value."""
    path: list[str] = []
    for part in location:
        inner = values if isinstance(values, dict) else {}
        if isinstance(values, list):
            inner = dict(enumerate(values))
        if part not in inner:
            continue
        values = inner[part]
        path.append(str(part))
    return tuple(path), values


class Words:
    """The words for what is wrong with values of one schema.

    Args:
        model: The schema; unknown keys are errors at every depth.
        renamed: Path of an old key -> the new name of its last part: old names are corrected too.
    """

    def __init__(self, model: type[BaseModel], renamed: Mapping[Keys, str]) -> None:
        self.model, self.renamed = model, renamed

    @cached_property
    def root(self) -> JsonObject:
        """The JSON schema, made when something is wrong or overridden."""
        return self.model.model_json_schema()

    def _follow(self, schema: JsonObject) -> JsonObject:
        while "$ref" in schema:
            schema = self.root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
        return schema

    def _choices(self, schema: JsonObject) -> list[JsonObject]:
        schema = self._follow(schema)
        if "anyOf" in schema:
            return [choice for part in schema["anyOf"] for choice in self._choices(part)]
        return [schema]

    def _at(self, path: tuple[str, ...]) -> JsonObject | None:
        """Return the JSON schema of the key at ``path``, None for an unknown one."""
        schemas = [self.root]
        for part in path:
            inner: list[JsonObject] = []
            for schema in schemas:
                if part in schema.get("properties", {}):
                    inner += self._choices(schema["properties"][part])
                elif isinstance(schema.get("additionalProperties"), dict):
                    inner += self._choices(schema["additionalProperties"])
                elif schema.get("additionalProperties") is True:
                    inner.append({})  # anything: checked by whoever reads it
                elif schema.get("type") == "array" and part.isdigit():
                    inner += self._choices(schema["items"])
            if not inner:
                return None
            schemas = inner
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    def _kinds(self, schema: JsonObject) -> set[str]:
        return {str(choice.get("type")) for choice in self._choices(schema)}

    def kinds_at(self, path: tuple[str, ...]) -> set[str]:
        """Return the JSON types that the key may hold (``string``…); none if unknown."""
        return self._kinds(self._at(path) or {})

    def _allowed(self, schema: JsonObject) -> str:
        pieces: list[str] = []
        for choice in self._choices(schema):
            if "enum" in choice:
                pieces.append("one of " + ", ".join(str(value) for value in choice["enum"]))
            elif "const" in choice:
                pieces.append(str(choice["const"]))
            elif choice.get("type") in ("integer", "number"):
                pieces.append(_number(choice))
            elif choice.get("type") == "array":
                item = self._allowed(choice["items"])
                least = f" of at least {choice['minItems']}" if "minItems" in choice else ""
                pieces.append(f"a list{least}, each {item}")
            else:
                pieces.append(_TYPES.get(choice.get("type", ""), "a value"))
        return " or ".join(dict.fromkeys(pieces))

    def _wrong(self, path: Keys, value: Any, origins: Origins) -> str:
        seen = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        seen = repr(seen) if isinstance(value, str) else seen
        seen = seen if len(seen) <= 80 else f"{seen[:77]}…"
        allowed = self._allowed(self._at(path) or {})
        return f"{'.'.join(path)} ({_origin(path, origins)}) is {seen}: expected {allowed}"

    def _valid_keys(self, path: Keys) -> list[str]:
        return [key for c in self._choices(self._at(path) or {}) for key in c.get("properties", {})]

    def _every_key(self, schema: JsonObject, path: Keys = ()) -> list[Keys]:
        keys: list[Keys] = []
        for key, value in schema.get("properties", {}).items():
            here = (*path, key)
            keys.append(here)
            for choice in self._choices(value):  # a section may be absent: null or the section
                keys += self._every_key(choice, here)
        return keys

    def _first_unknown(self, path: Keys) -> int:
        """Return the place in ``path`` of its first part that is not a key; the last if unsure."""
        for place, part in enumerate(path):
            valid = self._valid_keys(path[:place])
            if valid and part not in valid:
                return place
        return len(path) - 1

    def _unknown(self, path: Keys, origins: Origins) -> str:
        siblings = self._valid_keys(path[:-1])
        every = [".".join(key) for key in self._every_key(self.root)]
        wrong = self._first_unknown(path)  # a section's name may be what is mistyped
        names = {key: key for key in self._valid_keys(path[:wrong])}
        names |= {old[-1]: new for old, new in self.renamed.items() if old[:-1] == path[:wrong]}
        close = difflib.get_close_matches(path[wrong], names, n=1, cutoff=0.6)
        elsewhere = [key for key in every if key.rsplit(".", 1)[-1] == path[-1]]
        dotted = ".".join(path)
        if close and not (len(path) == 1 and elsewhere):  # a bare name is whole in a section
            corrected = (*path[:wrong], names[close[0]], *path[wrong + 1 :])
            hint = f"did you mean {'.'.join(corrected)!r}?"
        elif elsewhere:
            hint = f"did you mean {' or '.join(map(repr, elsewhere[:3]))}?"
        else:
            hint = did_you_mean(dotted, every)
            if not hint.startswith("did you mean"):
                hint = f"known: {', '.join(sorted(siblings or self._valid_keys(())))}"
        return f"{dotted} ({_origin(path, origins)}) is not a key: {hint}"

    def screen(self, values: JsonObject, origins: Origins) -> tuple[JsonObject, list[str]]:
        """Return ``values`` without what the schema's types let slip, and a message for each.

        These are unknown keys at any depth, and true or false where a number belongs.
        """
        problems: list[str] = []

        def walk(value: Any, path: Keys) -> Any:
            if isinstance(value, list):
                return [walk(item, (*path, str(index))) for index, item in enumerate(value)]
            if not isinstance(value, dict):
                return value
            schema = self._at(path)
            if schema is None or not any(c.get("type") == "object" for c in self._choices(schema)):
                return value  # a section where a value belongs: the type check says so
            accepted = {}
            for key, item in value.items():
                here = (*path, key)
                inner = self._at(here)
                if inner is None:
                    problems.extend(
                        self._unknown(leaf, origins) for leaf in _leaf_paths(item, here)
                    )
                elif isinstance(item, bool) and inner and "boolean" not in self._kinds(inner):
                    problems.append(self._wrong(here, item, origins))
                else:
                    accepted[key] = walk(item, here)
            return accepted

        return walk(values, ()), problems

    def explain(self, error: ValidationError, values: JsonObject, origins: Origins) -> list[str]:
        """Return one line for each key that failed validation."""
        lines: dict[Keys, str] = {}
        for item in error.errors(include_url=False):
            if item["type"] == "missing":
                path = tuple(str(part) for part in item["loc"])
                example = " (a hub id or a folder)" if path == ("model",) else ""
                lines[path] = f"{'.'.join(path)} is missing: give {'.'.join(path)}=…{example}"
                continue
            path, value = _locate(item["loc"], values)
            if item["type"] == "value_error":
                reason = item["msg"].removeprefix("Value error, ")
                place = f"{'.'.join(path)} ({_origin(path, origins)}): " if path else ""
                lines[path] = place + reason
            else:
                lines[path] = self._wrong(path, value, origins)
        # A list whose element is wrong also "is not text": keep the innermost complaint only.
        return [
            line
            for path, line in lines.items()
            if not any(other != path and other[: len(path)] == path for other in lines)
        ]


@lru_cache(maxsize=8)
def words_for(model: type[BaseModel], renamed: tuple[tuple[Keys, str], ...] = ()) -> Words:
    """Return the words of a schema, made once; ``renamed`` as pairs, see ``Words``."""
    return Words(model, dict(renamed))


def checked(
    schema: type[Checked],
    values: JsonObject,
    origins: Origins,
    problems: list[str],
    what: str,
    aliases: Aliases | None = None,
    context: object = None,
) -> Checked:
    """Return ``values`` as ``schema``, or raise one error with all ``problems`` and more.

    Args:
        schema: What they must fit.
        values: Nested.
        origins: Where each value came from.
        problems: Found so far, one line each.
        what: What it is, for the message: ``recipe NAME``.
        aliases: Old keys that are still read: a mistyped one is corrected to today's.
        context: What the schema's validators are told.

    Raises:
        SlimError: With several problems the message counts them and ``details`` lists them.
    """
    if not problems:
        # Pydantic refuses all that ``screen`` does; the JSON schema for its words is made when
        # there is something to say.
        with contextlib.suppress(ValidationError):
            return schema.model_validate(values, context=context)
    words = words_for(schema, tuple((aliases or {}).items()))
    accepted, rejected = words.screen(values, origins)
    problems = problems + rejected
    result = None
    try:
        result = schema.model_validate(accepted, context=context)
    except ValidationError as error:
        problems += words.explain(error, accepted, origins)
    if problems or result is None:
        if len(problems) == 1:
            raise SlimError(f"{what}: {problems[0]}")
        raise SlimError(f"{what}: {len(problems)} problems", details=problems)
    return result
