"""What two ranks do in ``test_divided.py``: one process of each computes all cases in turn.

``python -m tests.evaluation.divided_ranks FOLDER`` prints one JSON object a case on every rank.
"""

from __future__ import annotations

import _thread
import contextlib
import gc
import json
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any
from urllib import request as web
from urllib.error import HTTPError

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_slim.adapters.stack import load_adapters, parse_adapters, used_folders
from mlx_slim.agreement import rank_memory, refuse_differences
from mlx_slim.bench.link import compare_ranks
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.chat import open_session
from mlx_slim.evaluation.divided import chosen_split, load_divided
from mlx_slim.evaluation.following import leading
from mlx_slim.evaluation.scoring.generate import generate_batch
from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.requests import Request
from mlx_slim.finetuning.rank_facts import refuse_unlike_ranks
from mlx_slim.models.load import read_config
from mlx_slim.quantization.base import load_base
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import world
from mlx_slim.serving.options import ServeOptions
from mlx_slim.serving.run import serve

# name -> (model, how, adapters, whether quantized layers become dense)
CASES: dict[str, tuple[str, Any, list[str], bool | None]] = {
    "tensor": ("llama", "tensor", [], None),
    "pipeline": ("qwen2", "pipeline", [], None),
    "packed": ("packed", "tensor", [], False),
    "dense": ("packed", "tensor", [], True),
    "lora": ("llama", "tensor", ["lora"], None),
    "dora": ("qwen2", "pipeline", ["dora"], None),
    "stack": ("llama", "tensor", ["lora=0.5", "other=-0.25"], None),
}
_ROOT = tuple(range(1, 21))
REQUESTS = [Request((*_ROOT, *more), 20) for more in ((5, 6), (7, 8, 9), (5, 7), (9,))]
REQUESTS.append(Request((3, 9, 9, 4), 2))
PROMPTS = [[5, 6, 7], [5, 6, 7, 8, 9, 1, 2, 3]]


def _bytes(model: Any, names: str = "") -> int:
    tensors: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return sum(value.nbytes for name, value in tensors if names in name)


def _answers(model: Any, tokenizer: Any) -> tuple[list[float], list[list[int]]]:
    model.eval()
    scorer = LoglikelihoodScorer(model)
    scores = [one.loglikelihood for one in scorer.score(REQUESTS, _ROOT)]
    answers = generate_batch(model, tokenizer, PROMPTS, 8, cache_bytes=1 << 24)
    return scores, [one.ids for one in answers]


def _read_bytes() -> int:
    """Return the bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def case(folder: Path, name: str) -> dict[str, Any]:
    """Return how a divided model compares with the whole one."""
    model, how, adapters, dense = CASES[name]
    stack = parse_adapters([str(folder / one) for one in adapters])
    whole = load_base(folder / model, used_folders(stack), dtype=mx.float32)
    if stack:
        load_adapters(whole.model, stack)
    expected, texts = _answers(whole.model, whole.tokenizer)
    size, ends = _bytes(whole.model), _bytes(whole.model, "embed") + _bytes(whole.model, "lm_head")
    size -= _bytes(whole.model, "lora_")
    del whole
    gc.collect()
    before, read = mx.get_active_memory(), _read_bytes()
    mx.reset_peak_memory()
    part, is_dense = load_divided(
        folder / model, how, stack, memory=1 << 34, dense=dense, dtype=mx.float32
    )
    gc.collect()
    active, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    read = _read_bytes() - read
    tensors: list[tuple[str, mx.array]] = tree_flatten(part.model.parameters())  # type: ignore[assignment]
    scores, ids = _answers(part.model, part.tokenizer)
    return {
        "case": name,
        "gap": max(abs(a - b) for a, b in zip(scores, expected, strict=True)),
        "same_answers": ids == texts,
        "dense": is_dense,
        "whole": size,
        "ends": ends,
        "part": _bytes(part.model),
        "active": active,
        "peak": peak,
        "tensors": len(tensors),
        "largest": max(value.nbytes for _, value in tensors),
        "read": read,
    }


def refused(work: Any) -> str:
    """Return the message that ``work`` is refused with; empty on a rank that only ends."""
    try:
        work()
    except SlimError as error:
        return str(error)
    except SystemExit as error:
        return f"exit {error.code}"
    return "not refused"


def chat(folder: Path) -> dict[str, Any]:
    """Return two turns that rank 0 asks for, sampled, and how adapters are switched."""
    session = open_session(folder / "qwen2", parallel="auto")
    mx.random.seed(world().rank())  # the ranks draw other tokens, and go on with those of rank 0
    answers: list[str] = []
    with leading(session) as leads:
        answers += [
            "".join(session.stream(prompt, max_tokens=6, temperature=1.0))
            for prompt in (([5, 6, 7], [5, 6, 7, 8]) if leads else ())
        ]
    return {"case": "chat", "answers": answers, "switch": refused(lambda: session.use("lora"))}


def served(folder: Path) -> dict[str, Any]:
    """Return what rank 0 answers to clients, two at a time, while the others compute along."""
    answers: list[str] = []
    notes: list[str] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def ask(address: str) -> None:
        with ThreadPoolExecutor(2) as clients:
            bodies: list[JsonObject] = [{"prompt": text} for text in ("hello", "good bye")]
            bodies.append({"prompt": "hello", "seed": 1})
            answers.extend(clients.map(lambda body: _completion(address, body), bodies))
        _thread.interrupt_main()

    with contextlib.suppress(KeyboardInterrupt):
        serve(
            str(folder / "llama"),
            ServeOptions(port=0, parallel="tensor"),
            tell=notes.append,
            started=lambda address, _: Thread(target=ask, args=[address]).start(),
        )
    adapters = ServeOptions(adapter=("lora",), parallel="tensor")
    refusal = refused(lambda: serve("", adapters, tell=notes.append, started=lambda *_: None))
    return {"case": "served", "answers": answers, "notes": notes, "adapter": refusal}


def _completion(address: str, body: JsonObject) -> str:
    data = json.dumps({"max_tokens": 6, "temperature": 1.0, **body}).encode()
    request = web.Request(f"{address}/completions", data, {"Content-Type": "application/json"})
    try:
        with web.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]["text"]
    except HTTPError as error:
        return error.read().decode()


def unlike(folder: Path) -> dict[str, Any]:
    """Return what is said of ranks with other rows, and of the machines they are on."""
    recipe = ["smollm2-lora", f"model={folder / 'llama'}", "revision=null", "data.validation=0"]

    def changed(rows: str) -> list[str]:
        return [*recipe[1:], f"data.path={folder / rows}"]

    other = load_recipe(recipe[0], changed(f"rows-{world().rank()}.jsonl")).recipe
    same = load_recipe(recipe[0], changed("rows-0.jsonl")).recipe
    refuse_unlike_ranks(same)
    return {
        "case": "unlike",
        "train": refused(lambda: refuse_unlike_ranks(other)),
        "machines": compare_ranks(recipe[0], changed(f"rows-{world().rank()}.jsonl")),
    }


def _unlike_models(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield what the ranks open with something else: of the same sizes, but for ``way``."""
    rank = world().rank()
    adapter = [str(folder / ("lora" if rank else "other"))]
    yield "weights", lambda: open_session(folder / f"seed-{rank}", parallel="tensor")
    yield "adapter", lambda: open_session(folder / "llama", adapter, parallel="tensor")
    way: Any = ("tensor", "pipeline")[rank]
    yield "way", lambda: open_session(folder / "qwen2", parallel=way)


def main() -> None:
    """Print every case."""
    folder, rank = Path(sys.argv[1]), world().rank()
    for name in CASES:
        print(json.dumps(case(folder, name)), flush=True)
    print(json.dumps(chat(folder)), flush=True)
    print(json.dumps(served(folder)), flush=True)
    print(json.dumps(unlike(folder)), flush=True)
    config = read_config(folder / "llama")
    print(
        json.dumps(
            {
                "case": "agreement",
                "memory": rank_memory(1000),
                "fits": chosen_split("auto", config, fits=True, questions=True),
                "larger": chosen_split("auto", config, fits=False, questions=True),
                "versions": refused(lambda: refuse_differences({"mlx": f"0.{rank}", "rows": 1})),
                "broken": refused(
                    lambda: load_divided(folder / f"half-{rank}", "tensor", memory=1)
                ),
                "data": refused(lambda: open_session(folder / "llama", parallel="data")),
                **{name: refused(lambda w=work: w()) for name, work in _unlike_models(folder)},
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
