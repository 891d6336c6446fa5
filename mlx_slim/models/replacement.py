"""Functions of MLX that other ones replace for a while, where models look them up.

Invariant: contexts may nest, and those of several threads may end in any order: the first that
opens replaces, the last that ends puts back what the first one met. Used by
``models/token_list.py`` and ``models/host_exponentials.py``. Try it:
``python -m pytest tests/models/test_replacement.py``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Functions = Sequence[Callable[..., Any]]


class Replacement:
    """Attributes that are others while a context is open, in any thread.

    Args:
        places: (module, name) of each.
        around: Returns the new functions; gets those that stand there before.

    Attributes:
        contexts: How many are open.
    """

    def __init__(self, places: Sequence[tuple[Any, str]], around: Callable[..., Functions]) -> None:
        self._places, self._around = places, around
        self._before: Functions = ()
        self._lock = threading.Lock()
        self.contexts = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Replace the functions inside."""
        with self._lock:
            if not self.contexts:
                self._before = [getattr(*place) for place in self._places]
                self._set(self._around(*self._before))
            self.contexts += 1
        try:
            yield
        finally:
            with self._lock:
                self.contexts -= 1
                if not self.contexts:
                    self._set(self._before)

    def _set(self, functions: Functions) -> None:
        for (module, name), function in zip(self._places, functions, strict=True):
            setattr(module, name, function)
