"""What the first context met stands there again when the last one has ended."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from mlx_slim.models.replacement import Replacement


def test_contexts_nest_and_end_in_any_order() -> None:
    module = SimpleNamespace(root=math.sqrt, log=math.log)
    replaced = Replacement(
        [(module, "root"), (module, "log")],
        lambda root, log: (lambda x: -root(x), lambda x: -log(x)),
    )
    first, second = replaced(), replaced()
    first.__enter__()
    second.__enter__()
    assert (module.root(4), module.log(1), replaced.contexts) == (-2, 0, 2)
    first.__exit__(None, None, None)
    assert module.root(4) == -2
    second.__exit__(None, None, None)
    assert (module.root, module.log, replaced.contexts) == (math.sqrt, math.log, 0)


def test_an_error_puts_them_back() -> None:
    module = SimpleNamespace(root=math.sqrt)
    replaced = Replacement([(module, "root")], lambda root: (abs,))
    with pytest.raises(ZeroDivisionError), replaced(), replaced():
        assert module.root is abs
        raise ZeroDivisionError
    assert module.root is math.sqrt
