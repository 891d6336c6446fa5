"""Put a folder on the hub, through huggingface-hub.

Invariant: nothing leaves this machine unless ``yes``, and nothing but files of the folder, never
the target of a link; a new repository is private unless
``public``, and a public one is not written to without it; no token is read here or printed. Try it:
``mlx-slim upload fused --repo me/my-model``, which only says what it would do.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_slim.adapters.store import CONFIG
from mlx_slim.artifacts import public_name
from mlx_slim.errors import SlimError, printable, without_secrets
from mlx_slim.export.card import CARD, Card, describe
from mlx_slim.models.tensors import few
from mlx_slim.reading import JsonObject, field, read_object
from mlx_slim.runtime import hub_offline
from mlx_slim.units import human_bytes

_BULK = "checkpoints"  # a run folder keeps its tokens and checkpoints in it


@dataclass(frozen=True)
class Uploaded:
    """What was, or would be, put on the hub.

    Attributes:
        repo: ``owner/name``.
        files: (path inside the folder, bytes).
        private: Whether a new repository is private.
        done: False for a dry run.
        url: Of the repository, once done.
        notes: What the user should look at.
    """

    repo: str
    files: list[tuple[str, int]]
    private: bool
    done: bool
    url: str
    notes: list[str]

    def lines(self) -> list[str]:
        """Return what the command prints."""
        total = human_bytes(sum(size for _, size in self.files))
        seen = "private" if self.private else "public"
        verb = "uploaded" if self.done else "would upload"
        lines = [f"{verb} {len(self.files)} files, {total}, to {self.repo} ({seen})"]
        lines += [f"  {name}  {human_bytes(size)}" for name, size in self.files]
        lines += [f"note: {note}" for note in self.notes]
        lines.append(self.url if self.done else "nothing was sent; add --yes to upload")
        return [printable(line) for line in lines]


def upload(
    folder: Path, repo: str, *, yes: bool = False, public: bool = False, revision: str | None = None
) -> Uploaded:
    """Upload ``folder`` to the model repository ``repo``.

    Args:
        folder: A model, an adapter or an export; gets a card if it has none.
        repo: ``owner/name``.
        yes: Do it; otherwise only say what would happen.
        public: Make the repository public, or write to one that is.
        revision: Branch to commit to.

    Raises:
        SlimError: If the folder or the name cannot be used, the hub is offline or refuses.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SlimError(f"{repo!r} is not a repository name", "write it as owner/name") from error
    if repo.count("/") != 1:
        raise SlimError(f"{repo!r} is not a repository name", "write it as owner/name")
    files = _files(folder)
    notes = _notes(folder, files)
    if yes:
        url = _send(folder, [name for name, _ in files], repo, public, revision)
        return Uploaded(repo, files, not public, True, url, notes)
    return Uploaded(repo, files, not public, False, "", notes)


def _files(folder: Path) -> list[tuple[str, int]]:
    if not folder.is_dir():
        raise SlimError(f"{folder} is not a folder", "give the folder of a model or an adapter")
    if (folder / _BULK).is_dir() or (folder / "metrics.jsonl").exists():
        inner = next((n for n in ("adapters", "model") if (folder / n).is_dir()), "adapters")
        raise SlimError(
            f"{folder} is a run, with checkpoints and the tokens of its data in it",
            f"upload what it made: {folder / inner}",
        )
    shown = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if links := [path.relative_to(folder).as_posix() for path in shown if path.is_symlink()]:
        raise SlimError(
            f"{folder} holds links, which may lead out of it: {few(links)}",
            "put copies of the files in their place (cp -L); only files of the folder are uploaded",
        )
    sized = [
        (path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in shown
        if path.is_file()
    ]
    if not any(name.endswith((".safetensors", ".gguf")) for name, _ in sized):
        raise SlimError(
            f"{folder} holds no weights (.safetensors or .gguf)",
            "give the folder of a model or an adapter",
        )
    return sized


def _notes(folder: Path, files: list[tuple[str, int]]) -> list[str]:
    notes = []
    if not any(name == CARD for name, _ in files):
        notes.append(f"{CARD} is made from the records in the folder")
    for name, _ in files:
        if Path(name).name == CONFIG:
            base = _base(read_object(folder / name), name)
            if Path(base).is_absolute() or Path(base).exists():
                notes.append(f"{name} names the base by a path of this machine: {base}")
    return notes


def _base(settings: JsonObject, where: str) -> str:
    keys = ("base_model_name_or_path", "model")
    return next((name for key in keys if (name := field(settings, where, key, str, ""))), "")


def _card(folder: Path) -> bytes:
    """Return a card for a folder that has none."""
    settings = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    base = _base(settings, CONFIG)
    library = "peft" if "peft_type" in settings else "mlx"
    what = "An adapter" if settings else "A model"
    card = Card(public_name(folder.absolute()), base, library, f"{what} made with mlx-slim.")
    describe(folder, card)
    return card.text().encode()


def _send(folder: Path, names: list[str], repo: str, public: bool, revision: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if hub_offline():
        raise SlimError("HF_HUB_OFFLINE is set: nothing can be uploaded", "unset it")
    api: Any = HfApi()
    try:
        try:
            exists = api.repo_info(repo, repo_type="model")
        except RepositoryNotFoundError:
            exists = None
        if exists is not None and not exists.private and not public:
            raise SlimError(
                f"{repo} exists and is public", "add --public to write to it, or choose another"
            )
        if exists is None:
            api.create_repo(repo, repo_type="model", private=not public, exist_ok=True)
        if not (folder / CARD).exists():
            api.upload_file(
                path_or_fileobj=_card(folder),
                path_in_repo=CARD,
                repo_id=repo,
                revision=revision,
                commit_message="Model card",
            )
        done = api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],  # what was listed, no more
            ignore_patterns=[".*", "**/.*"],
            commit_message="Upload with mlx-slim",
        )
    except SlimError:
        raise
    except Exception as error:  # the client's errors: no login, no network, no right
        reason = without_secrets(" ".join(str(error).split()))[:300]
        raise SlimError(
            f"the hub refused the upload: {type(error).__name__}: {reason}",
            "hf auth login, and check that the owner is you or your organisation",
        ) from None
    return str(getattr(done, "repo_url", "") or f"{api.endpoint}/{repo}")
