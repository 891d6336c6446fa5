"""The fast BLAS: renamed names resolve, MLX computes with them, and every way out works."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_slim import blas
from mlx_slim.blas import elf

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="macOS has Accelerate: nothing to do"
)
ROOT = Path(__file__).parents[2]
NAMES = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "sgetrf_", "ssyevd_", "sgesdd_", "spotrf_")
USES_MLX = """
import mlx_slim, numpy as np, mlx.core as mx
from mlx_slim import blas
a = np.random.default_rng(0).normal(size=(96, 96)).astype(np.float32)
x = mx.array(a)
with mx.stream(mx.cpu):
    product, inverse, (u, s, vt) = x @ x, mx.linalg.inv(x), mx.linalg.svd(x)
    rebuilt, identity = (u * s) @ vt, inverse @ x
np.testing.assert_allclose(product, a @ a, rtol=1e-4, atol=1e-3)
np.testing.assert_allclose(rebuilt, a, atol=1e-3)
np.testing.assert_allclose(identity, np.eye(96), atol=1e-2)
print(blas.status().source, blas.bound_library())
"""


@pytest.fixture
def original() -> Path:
    path = blas._scipy_openblas()
    if path is None:
        pytest.skip("scipy-openblas32 is not installed")
    return path


def python(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in a fresh process from the repository's root."""
    base = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**base, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=check,
    )


def test_names_resolve_without_their_prefix(original: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.so"
    copy.write_bytes(elf.without_prefix(original.read_bytes(), b"scipy_"))
    library = ctypes.CDLL(str(copy))
    for name in NAMES:
        assert getattr(library, name)
        assert not hasattr(library, f"scipy_{name}")
    assert not hasattr(library, "no_such_symbol")


def test_every_symbol_of_the_original_is_found_under_its_new_name(
    original: Path, tmp_path: Path
) -> None:
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    copy = tmp_path / "copy.so"
    copy.write_bytes(elf.without_prefix(original.read_bytes(), b"scipy_"))
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(original)], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1].removeprefix("scipy_") for line in listing.splitlines()]
    library = ctypes.CDLL(str(copy))
    assert len(names) > 1000
    assert [name for name in names if not hasattr(library, name)] == []


def test_mlx_computes_with_the_copy_and_computes_right(original: Path, tmp_path: Path) -> None:
    output = python("-c", USES_MLX, MLX_SLIM_CACHE=str(tmp_path)).stdout.split()
    (copy,) = (tmp_path / "blas").iterdir()
    assert output == ["scipy-openblas32", str(copy)]


def test_the_library_is_looked_for_when_mlx_is_imported(original: Path, tmp_path: Path) -> None:
    code = (
        "import sys, mlx_slim; print('mlx_slim.blas' in sys.modules)\n"
        "import mlx.core; print(mlx_slim.blas._status.source, len(sys.meta_path))\n"
        "import mlx.core; mlx_slim.blas.activate(); print(len(sys.meta_path))"
    )
    before, after, again = python("-c", code, MLX_SLIM_CACHE=str(tmp_path)).stdout.splitlines()
    assert before == "False" and after.split() == ["scipy-openblas32", again]


def test_it_finds_itself_and_not_the_reference_blas_of_mlx(original: Path, tmp_path: Path) -> None:
    code = (
        "import mlx_slim, mlx.core, ctypes\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('libblas' in maps, mlx_slim.blas.bound_library())"
    )
    output = python("-c", code, MLX_SLIM_CACHE=str(tmp_path)).stdout.split()
    assert output[1].startswith(str(tmp_path))


def test_opting_out_leaves_mlx_alone(tmp_path: Path) -> None:
    output = python("-c", USES_MLX, MLX_SLIM_BLAS="off", MLX_SLIM_CACHE=str(tmp_path)).stdout
    assert output.split() == ["off", "None"]
    assert not list(tmp_path.iterdir())


def test_too_late_is_said_and_nothing_is_done(tmp_path: Path) -> None:
    code = "import mlx.core, mlx_slim.blas; print(mlx_slim.blas.status())"
    output = python("-c", code, MLX_SLIM_CACHE=str(tmp_path)).stdout
    assert "source='late'" in output
    assert "import mlx_slim before mlx.core" in output


def test_another_library_can_be_named(original: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(elf.without_prefix(original.read_bytes(), b"scipy_"))
    output = python("-c", USES_MLX, MLX_SLIM_BLAS=str(other)).stdout.split()
    assert output == ["user", str(other)]


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_a_named_library_that_cannot_be_used_is_reported(
    content: bytes | None, tmp_path: Path
) -> None:
    other = tmp_path / "other.so"
    if content is not None:
        other.write_bytes(content)
    code = "import mlx_slim.blas; print(mlx_slim.blas.status())"
    output = python("-c", code, MLX_SLIM_BLAS=str(other)).stdout
    assert "source='none'" in output
    assert "cannot be used" in output


def test_a_library_without_blas_is_refused(original: Path) -> None:
    code = "import mlx_slim.blas; print(mlx_slim.blas.status())"
    output = python("-c", code, MLX_SLIM_BLAS=str(original)).stdout  # its names have the prefix
    assert "does not export cblas_sgemm" in output


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty"])
def test_a_damaged_copy_is_made_again(damage: str, original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "blas"
    copy = blas._renamed_copy(original, folder)
    whole = copy.read_bytes()
    copy.write_bytes({"truncate": whole[:-100], "garbage": b"x" * len(whole), "empty": b""}[damage])
    assert blas._renamed_copy(original, folder) == copy
    assert copy.read_bytes() == whole
    assert list(folder.iterdir()) == [copy]  # no temporary file is left


def test_a_whole_copy_is_not_written_again(original: Path, tmp_path: Path) -> None:
    copy = blas._renamed_copy(original, tmp_path)
    before = copy.stat().st_mtime_ns
    assert blas._renamed_copy(original, tmp_path).stat().st_mtime_ns == before


def test_two_processes_may_make_the_copy_at_once(original: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_SLIM_CACHE": str(tmp_path)}
    environment.pop("LD_PRELOAD", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", USES_MLX], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    (copy,) = (tmp_path / "blas").iterdir()
    assert outputs == [["scipy-openblas32", str(copy)]] * 3
    assert all(process.returncode == 0 for process in processes)


def test_an_unwritable_cache_falls_back_to_the_temporary_folder(
    original: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file, not a folder")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    output = python("-c", USES_MLX, MLX_SLIM_CACHE=str(blocked), TMPDIR=str(temporary)).stdout
    source, path = output.split()
    assert source == "scipy-openblas32"
    assert path.startswith(str(temporary))


def test_a_folder_that_others_may_write_to_is_not_trusted(original: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(OSError, match="others may write"):
        blas._renamed_copy(original, tmp_path)


def test_the_module_prints_a_path_to_preload(original: Path, tmp_path: Path) -> None:
    result = python("-m", "mlx_slim.blas", MLX_SLIM_CACHE=str(tmp_path))
    path = result.stdout.strip()
    assert Path(path).is_file()
    assert result.stderr == ""
    code = "import mlx_slim.blas; print(*vars(mlx_slim.blas.status()).values())"
    again = python("-c", code, LD_PRELOAD=path, MLX_SLIM_CACHE=str(tmp_path)).stdout.split()
    assert again == ["preloaded", path]
    code = "import mlx.core as mx; print((mx.ones((64, 64)) @ mx.ones((64, 64))).sum().item())"
    assert python("-c", code, LD_PRELOAD=path).stdout.strip() == "262144.0"


def test_the_module_prints_nothing_after_opting_out() -> None:
    result = python("-m", "mlx_slim.blas", MLX_SLIM_BLAS="off", check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert "MLX_SLIM_BLAS" in result.stderr


def test_no_fast_blas_at_all_is_reported_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_scipy_openblas", lambda: None)
    monkeypatch.setattr(blas, "_SYSTEM", ("libno_such_blas.so",))
    monkeypatch.setattr(blas, "bound_library", lambda: None)
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.delenv("MLX_SLIM_BLAS", raising=False)
    status = blas._activate()
    assert (status.source, status.path) == ("none", None)
    assert "pip install scipy-openblas32" in status.note


def test_files_that_are_no_library_are_refused(original: Path) -> None:
    whole = original.read_bytes()
    for data in (b"", b"text", whole[:50], whole[:4000], b"\x7fELF\x01\x01" + whole[6:]):
        with pytest.raises(elf.ElfError):
            elf.without_prefix(data, b"scipy_")


def test_hash_of_a_symbol_name() -> None:
    assert elf.sysv_hash(b"") == 0
    assert elf.sysv_hash(b"printf") == 0x077905A6  # the value that `readelf` and the gABI give
    assert elf.sysv_hash(b"syscall") == 0x0B09985C


def test_a_table_needs_room() -> None:
    assert len(elf._hash_table([b"", b"a", b"b"], 4 * 8)) == 4 * (2 + 3 + 3)
    with pytest.raises(elf.ElfError, match="no room"):
        elf._hash_table([b"", b"a", b"b"], 4 * 5)


def test_soname_differs_from_the_original(original: Path) -> None:
    data = elf.without_prefix(original.read_bytes(), b"scipy_")
    tables = [s for s in elf._segments(bytearray(data)) if s[0] == elf._PT_DYNAMIC]
    (_, offset, _, length) = tables[0]
    tags = dict(struct.unpack_from("<qQ", data, at) for at in range(offset, offset + length, 16))
    name = data[tags[elf._DT_STRTAB] + tags[elf._DT_SONAME] :].split(b"\0", 1)[0]
    assert name == b"openblas.so"
    assert elf._DT_GNU_HASH not in tags


def test_threads_are_the_physical_cores_unless_the_user_says_otherwise(original: Path) -> None:
    code = (
        "import ctypes, mlx_slim, mlx.core; print(ctypes.CDLL(None).openblas_get_num_threads(), "
        "mlx_slim.blas.physical_cores())"
    )
    threads = dict.fromkeys(blas._THREADS, "")
    chosen, cores = python("-c", code, **threads).stdout.split()
    assert chosen == cores
    assert 1 <= int(cores) <= len(os.sched_getaffinity(0))
    threads["OPENBLAS_NUM_THREADS"] = "1"
    assert python("-c", code, **threads).stdout.split()[0] == "1"


def test_who_computes_beside_it_leaves_it_one_thread(original: Path) -> None:
    code = """
import ctypes
from mlx_slim import blas
import mlx.core, numpy as np
libraries = [(ctypes.CDLL(None), "openblas_{}"), *blas._numpy_openblas()]
def threads(): return [getattr(one, form.format("get_num_threads"))() for one, form in libraries]
print(*threads())
with blas.single_threaded(): print(*threads())
with blas.numpy_single_threaded(): print(*threads())
print(*threads())
"""
    threads = dict.fromkeys(blas._THREADS, "")
    threads["OPENBLAS_NUM_THREADS"] = "2"
    lines = python("-c", code, **threads).stdout.splitlines()
    numbers = [[int(number) for number in line.split()] for line in lines]
    if len(numbers[0]) < 2:
        pytest.skip("this NumPy brings no OpenBLAS")
    before, all_single, numpy_single, after = numbers
    assert before == after and set(all_single) == {1}
    assert numpy_single == [before[0], 1]
