"""The model names that a server answers to: those of its command line, and no others.

Invariant: a name is looked up in this table only; it never becomes a path or a hub id. Try it:
``python -m pytest tests/serving/test_names.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_slim.adapters.stack import Weighted, parse_adapters
from mlx_slim.adapters.store import check_adapter
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.reading import shown

# What mlx-lm calls a model that a request does not name.
DEFAULT = "default_model"


class NotServed(SlimError):
    """A request names something that was not given on the command line."""


@dataclass(frozen=True)
class ServedNames:
    """What requests may name.

    Attributes:
        model: As given on the command line.
        adapters: Name, as given, -> the adapter.
        draft: The draft as given, or None.
    """

    model: str
    adapters: dict[str, Weighted]
    draft: str | None

    @classmethod
    def of(cls, model: str, adapters: tuple[str, ...], draft: str | None) -> ServedNames:
        """Return the names of a command line; the adapters' files are checked.

        Raises:
            SlimError: If an adapter cannot be read, or two things have one name.
        """
        named: dict[str, Weighted] = {}
        for text in adapters:
            name = text if "://" in text else text.rstrip("/") or text
            if name in named or name in (model, DEFAULT):
                raise SlimError(
                    f"{name} is given twice: each adapter is a model name of its own",
                    "name it once",
                )
            (named[name],) = parse_adapters(text)
            check_adapter(named[name].folder)
        return cls(model, named, draft)

    @property
    def all(self) -> list[str]:
        """The model, then its adapters."""
        return [self.model, *self.adapters]

    @property
    def folders(self) -> list[Path]:
        """Of all adapters that have a weight."""
        return [one.folder for one in self.adapters.values() if one.weight != 0]

    def resolve(self, model: str, adapter: str | None = None, draft: str | None = None) -> str:
        """Return which of ``all`` a request names.

        Args:
            model: Its ``model``.
            adapter: Its ``adapters``: mlx-lm's key for one adapter of ``model``.
            draft: Its ``draft_model``.

        Raises:
            NotServed: If one of them is not served.
        """
        if draft not in (None, DEFAULT, self.draft):
            raise NotServed(f"no draft model {shown(draft)} is served")
        name = self.model if model == DEFAULT else model
        if name not in self.all:
            raise NotServed(f"no model {shown(model)} is served", did_you_mean(model, self.all))
        if adapter is None:
            return name
        if adapter not in self.adapters or name not in (self.model, adapter):
            raise NotServed(
                f"no adapter {shown(adapter)} of {shown(name)} is served",
                did_you_mean(adapter, self.all),
            )
        return adapter
