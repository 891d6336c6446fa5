"""The logits that exist at one time are bounded in bytes, and a GPU's chunk is worth its reads."""

from __future__ import annotations

import pytest

from mlx_slim.planner.macs import working_set
from mlx_slim.training.chunk_size import chunk_size


def test_chunk_size_bounds_the_logits() -> None:
    assert chunk_size(49152, None) * 49152 <= 1 << 24
    assert chunk_size(32000, 7) == 7
    assert chunk_size(32000, 7, gpu_bytes=1 << 40) == 7


@pytest.mark.parametrize("vocabulary", [32_000, 49_152, 152_064, 262_144])
@pytest.mark.parametrize("memory_gb", [8, 16, 64, 128])
def test_a_gpus_chunk_reads_the_head_seldom_and_holds_a_fraction_of_its_memory(
    vocabulary: int, memory_gb: int
) -> None:
    memory = working_set(memory_gb)
    chunk = chunk_size(vocabulary, None, gpu_bytes=memory)
    assert chunk <= 512
    assert 4 * 4 * chunk * vocabulary <= memory / 32
    assert chunk == 512 or 4 * 4 * (chunk + 1) * vocabulary > memory / 32
    assert chunk >= chunk_size(vocabulary, None, gpu_bytes=0)
    assert chunk_size(vocabulary, None, 2, gpu_bytes=memory) >= chunk // 2
    if memory_gb >= 64:  # the head is read twice a chunk
        assert 2 * -(-3000 // chunk) <= 20


def test_this_machines_device_decides(as_on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_slim.training.chunk_size.device_memory", lambda: working_set(16))
    assert chunk_size(152_064, None) == chunk_size(152_064, None, gpu_bytes=working_set(16)) > 110
