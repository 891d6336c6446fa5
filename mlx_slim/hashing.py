"""SHA-256 of values, files and folders, hexadecimal.

Invariant: a hash depends on contents and names alone; how far a large file is hashed, a stage says.
Try it: ``mlx-slim eval MODEL --task openbookqa -o OUT``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlx_slim import reading
from mlx_slim.progress import Stage, stage

_BLOCK = 1 << 20  # bytes read at a time
_STRIDE, _SAMPLE = 1 << 22, 1 << 12  # bytes of ``hash_samples``


def hash_bytes(data: bytes) -> str:
    """Return the SHA-256 of ``data``, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def hash_json(value: Any) -> str:
    """Return the SHA-256 of ``value`` as canonical JSON (sorted keys)."""
    return hash_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a regular file, hexadecimal."""
    with stage(f"hashing {path.name}", _size(path), "bytes") as hashing:
        return _hash(path, hashing)


def hash_files(paths: Iterable[Path]) -> str:
    """Return one SHA-256 over names and contents; a hub blob's name tells its hash unread."""

    def one(path: Path) -> str:
        name = path.resolve().name if path.is_symlink() else ""
        return name if re.fullmatch(r"[0-9a-f]{64}", name) else _hash(path, hashing)

    files = sorted(paths)
    with (
        stage("hashing files", sum(map(_size, files)), "bytes") as hashing,
        ThreadPoolExecutor() as pool,
    ):
        return hash_json(
            dict(zip((path.name for path in files), pool.map(one, files), strict=True))
        )


def hash_samples(paths: Iterable[Path]) -> str:
    """Return a SHA-256 over names, sizes and 4 kB of every 4 MB: seconds, whatever the size.

    It tells other weights of the same shapes apart, and not a changed byte: no record holds it.
    """

    def one(path: Path) -> list[Any]:
        digest, size = hashlib.sha256(), _size(path)
        with reading.open_regular(path) as handle:
            for begin in range(0, size, _STRIDE):
                handle.seek(begin)
                digest.update(handle.read(_SAMPLE))
            handle.seek(max(0, size - _SAMPLE))
            digest.update(handle.read(_SAMPLE))
        return [path.name, size, digest.hexdigest()]

    with ThreadPoolExecutor() as pool:
        return hash_json(list(pool.map(one, sorted(paths))))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _hash(path: Path, hashing: Stage) -> str:
    digest = hashlib.sha256()
    with reading.open_regular(path) as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
            hashing.advance(len(block))
    return digest.hexdigest()
