"""How many positions get logits at one time, and into how many shards a batch is cut.

Invariant: the logits that exist at one time are bounded in bytes whatever batch and vocabulary are;
gradients do not depend on the number. Try it: ``mlx-slim train smollm2-lora train.loss_chunk=128``.
"""

from __future__ import annotations

from mlx_slim.runtime import device_memory, on_gpu

CHUNK_LOGITS = 1 << 23  # 8.4 M float32 logits: 34 MB each time a chunk of them is held on a CPU
CHUNK_POSITIONS = 512  # of a chunk on a GPU
PART_TOKENS = 256  # below this a shard of a batch is not worth its overhead
GPU_FRACTION = 128  # one float32 copy of a chunk takes at most 1/128 of a GPU's memory


def chunk_size(
    vocabulary: int, setting: int | None, num_threads: int = 1, *, gpu_bytes: int | None = None
) -> int:
    """Return how many positions get logits at one time.

    On a CPU about 34 MB of logits. On a GPU, a chunk of C positions reads the head twice, 2·D·V·b
    bytes at b bytes a weight, and computes 4·C·D·V operations on it: on M-series GPUs, which do
    about 36 operations for each byte that they can read, reading takes 36·b/(2·C) of the time of
    computing, whatever D and V are. That is 7% of it at b = 2 and C = 512, and 65% at the 55
    positions that 34 MB are at a vocabulary of 152k. Memory bounds it: about four float32 copies of
    a chunk are alive, and 4·4·C·V bytes stay below 1/32 of the GPU's memory.

    Args:
        vocabulary: V.
        setting: ``train.loss_chunk``, which wins.
        num_threads: Threads that compute a batch side by side; their chunks add up to one.
        gpu_bytes: Memory of the GPU that is planned for, 0 for a CPU; None is this machine.
    """
    if setting:
        return setting
    if gpu_bytes is None:
        gpu_bytes = device_memory() if on_gpu() else 0
    if not gpu_bytes:
        return max(32, CHUNK_LOGITS // (vocabulary * num_threads))
    return max(32, min(CHUNK_POSITIONS, gpu_bytes // (GPU_FRACTION * 4 * vocabulary * num_threads)))


def part_count(num_threads: int, tokens: int) -> int:
    """Return into how many shards ``num_threads`` threads cut a batch of ``tokens`` positions.

    Two shards a thread, where they are worth it: then half of the batch is in memory at a time.
    """
    return 1 if num_threads == 1 else min(2 * num_threads, max(num_threads, tokens // PART_TOKENS))
