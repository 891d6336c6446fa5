"""Fixtures shared by all tests: tiny models on disk, and where real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import mlx_slim  # noqa: F401  # first: it puts the fast BLAS under MLX, as every command does
from tests.support.tiny import tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """Return a function: architecture name -> folder of a tiny model, made once a session."""
    made: dict[str, Path] = {}

    def get(architecture: str = "llama") -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("models") / architecture
            made[architecture] = tiny_model(folder, architecture)
        return made[architecture]

    return get


def _folder_of(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} does not name a folder")
    return Path(value).resolve()


@pytest.fixture(scope="session")
def data_mirror() -> Path:
    """The data mirror, or skip."""
    return _folder_of("MLX_SLIM_DATA")


@pytest.fixture(scope="session")
def references() -> Path:
    """Answers of the reference implementations, or skip."""
    return _folder_of("MLX_SLIM_REFERENCE")
