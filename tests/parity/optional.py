"""What the extra ``parity`` brings; ``make parity`` fails where it is missing, other runs skip."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

WHY = "needs the extra parity: make parity"


def needed(name: str) -> Any:
    """Return a module of the extra ``parity``."""
    if os.environ.get("MLX_SLIM_PARITY") == "required":
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=WHY)
