"""Nothing leaves unless told to, what does is private, and no token is ever shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_slim.cli.main import run
from mlx_slim.errors import SlimError
from mlx_slim.export.peft import export_peft
from mlx_slim.export.upload import upload
from tests.support.adapters import write_adapter

TOKEN = "hf_" + "secret" * 5


class Hub:
    """A hub in memory; ``private`` None means that the repository does not exist."""

    endpoint = "https://hub.example"

    def __init__(self, private: bool | None = None, failure: Exception | None = None) -> None:
        self.private, self.failure, self.calls = private, failure, []

    def repo_info(self, repo: Any, **_: Any) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        if self.private is None:
            error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
            Exception.__init__(error, "absent")
            raise error
        return SimpleNamespace(private=self.private)

    def create_repo(self, repo: Any, **options: Any) -> None:
        self.calls.append(("create", repo, options["private"]))

    def upload_file(self, **options: Any) -> None:
        self.calls.append(("file", options["path_in_repo"], options["path_or_fileobj"]))

    def upload_folder(self, **options: Any) -> Any:
        if self.failure:
            raise self.failure
        self.allowed = options["allow_patterns"]
        self.calls.append(("folder", options["folder_path"], options["ignore_patterns"]))
        return SimpleNamespace(repo_url=f"{self.endpoint}/{options['repo_id']}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(**options: Any) -> Hub:
        fake_hub = Hub(**options)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake_hub)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        return fake_hub

    return install


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    export_peft(write_adapter(tmp_path / "a", tiny("llama")), tmp_path / "p", base_name="me/base")
    return tmp_path / "p"


def test_a_dry_run_sends_nothing(folder: Path, hub: Any, capfd: pytest.CaptureFixture[str]) -> None:
    calls = hub().calls
    assert run(["upload", str(folder), "--repo", "me/thing"]) == 0
    out = capfd.readouterr().out
    assert "would upload 3 files" in out and "(private)" in out and "adapter_model" in out
    assert "nothing was sent" in out and calls == [] and TOKEN not in out


def test_yes_makes_a_private_repository(folder: Path, hub: Any) -> None:
    fake = hub()
    (folder / ".cache").mkdir()
    done = upload(folder, "me/thing", yes=True)
    assert done.done and done.url == "https://hub.example/me/thing"
    assert fake.calls[0] == ("create", "me/thing", True)
    assert fake.calls[-1] == ("folder", str(folder), [".*", "**/.*"])
    assert fake.allowed == [name for name, _ in done.files]
    upload(folder, "me/thing", yes=True, public=True)
    assert ("create", "me/thing", False) in fake.calls


def test_a_folder_without_a_card_gets_one(
    tiny: Callable[..., Path], tmp_path: Path, hub: Any
) -> None:
    fake = hub(private=True)
    adapter = write_adapter(tmp_path / "a", tiny("llama"))
    done = upload(adapter, "me/thing", yes=True)
    kind, name, content = fake.calls[0]
    assert (kind, name) == ("file", "README.md") and b"library_name" in content
    assert str(tmp_path).encode() not in content
    assert any("a path of this machine" in note for note in done.notes)


def test_a_public_repository_needs_the_word(folder: Path, hub: Any) -> None:
    fake = hub(private=False)
    with pytest.raises(SlimError, match="exists and is public"):
        upload(folder, "me/thing", yes=True)
    assert fake.calls == []
    assert upload(folder, "me/thing", yes=True, public=True).done


def test_a_refusal_is_one_line_without_the_token(
    folder: Path, hub: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    hub(failure=RuntimeError(f"401 for Authorization: Bearer {TOKEN}\nlog in"))
    assert run(["upload", str(folder), "--repo", "me/thing", "--yes"]) == 2
    error = capfd.readouterr().err
    assert "the hub refused the upload: RuntimeError: 401" in error and "hf auth login" in error
    assert "secret" not in error.replace("(secret)", "") and error.count("error:") == 1


def test_what_cannot_be_uploaded(
    folder: Path, tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub()
    for name in ("noslash", "a/b/c", "me/bad name", "--x/y"):
        with pytest.raises(SlimError, match="not a repository name"):
            upload(folder, name)
    with pytest.raises(SlimError, match="is not a folder"):
        upload(tmp_path / "nothing", "me/thing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SlimError, match="holds no weights"):
        upload(tmp_path / "empty", "me/thing")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SlimError, match="is a run"):
        upload(tmp_path / "run", "me/thing")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SlimError, match="HF_HUB_OFFLINE"):
        upload(folder, "me/thing", yes=True)


@pytest.mark.parametrize("kind", ["file", "inside", "folder", "nothing", "deep"])
def test_links_are_refused_and_named(
    folder: Path, tmp_path: Path, hub: Any, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    calls = hub(private=True).calls
    secret = tmp_path / "elsewhere" / "passwords.txt"
    secret.parent.mkdir()
    secret.write_text("secret")
    (folder / "docs").mkdir()
    link = folder / ("docs/notes.txt" if kind == "deep" else "notes.txt")
    target = {
        "file": secret,
        "inside": folder / "README.md",
        "folder": secret.parent,
        "nothing": tmp_path / "gone",
        "deep": secret,
    }[kind]
    link.symlink_to(target)
    for more in ([], ["--yes"]):
        assert run(["upload", str(folder), "--repo", "me/thing", *more]) == 2
        printed = capfd.readouterr()
        name = link.relative_to(folder).as_posix()
        assert f"holds links, which may lead out of it: {name}" in printed.err and printed.out == ""
    assert calls == []
    link.rename(folder / ".hidden")  # hidden files are never uploaded
    assert "passwords" not in "\n".join(upload(folder, "me/thing").lines())


def test_names_reach_the_terminal_escaped(
    folder: Path, hub: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """A line feed would forge a line of the list; an escape sequence would be obeyed."""
    hub()
    names = {"a\nnothing was sent": r"a\nnothing was sent", "b\x1b[2K\u202e": r"b\x1b[2K\u202e"}
    for name in names:
        (folder / name).write_text("")
    assert run(["upload", str(folder), "--repo", "me/thing"]) == 0
    out = capfd.readouterr().out
    assert out.count("\n") == 7 and "\x1b" not in out and "\u202e" not in out
    assert all(f"  {name}  0 B\n" in out for name in names.values())
    (folder / "c\x1b[2K").symlink_to("nothing")
    assert run(["upload", str(folder), "--repo", "me/thing"]) == 2
    assert r"c\x1b[2K" in capfd.readouterr().err
