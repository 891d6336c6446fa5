"""One side of a benchmark in PyTorch: transformers + PEFT train, lm-eval scores; each in a process.

Invariant: the same token ids, model, dtype, adapter shape and number of threads as our side, and
the batching that these libraries advise: rows grouped by length, padded to the longest of a batch.
Neither counts its allocations on a CPU, so the peak is that of the process. Try it:
``mlx-slim bench train MODEL --against peft`` (``pip install 'mlx-slim[bench]'``).

Shapes: B rows of a batch, T tokens of the longest.
"""

# Of the extra bench:
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from mlx_slim.bench.eval_sides import EvalWork, read_questions
from mlx_slim.bench.rounds import process_peak_bytes, reset_process_peak, step_rates
from mlx_slim.bench.sides import RANK, SCALE, WARMUP_STEPS, TrainWork
from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject

NEEDED = {
    "peft": ("torch", "transformers", "peft"),
    "lm-eval": ("torch", "lm_eval"),
    "mlx-lm": ("torch", "lm_eval"),  # its scorer is a class of lm-eval too
}
_IGNORED = -100  # the target that transformers' loss leaves out
_SCORED_ROWS = 8  # rows of a batch of lm-eval


def check_installed(side: str) -> None:
    """Refuse a side whose libraries are not there.

    Raises:
        SlimError: With what to install.
    """
    missing = [name for name in NEEDED[side] if importlib.util.find_spec(name) is None]
    if missing:
        raise SlimError(
            f"--against {side} needs {', '.join(missing)}: not installed",
            "pip install 'mlx-slim[bench]' (PyTorch, PEFT and lm-eval: large)",
        )


def _device() -> tuple[Any, str]:
    """Return torch, with a thread for each core as on our side, and the device."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    if torch.cuda.is_available():
        return torch, "cuda"
    return torch, "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(torch: Any, name: str, device: str) -> Any:
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    return getattr(torch, name)


def _rows(work: TrainWork) -> list[tuple[list[int], list[int]]]:
    """Return token ids and targets of every row, as our side computes them."""
    from mlx_slim.config.schema import DataConfig
    from mlx_slim.data.ledger import SourceLedger
    from mlx_slim.data.pipeline import Pipeline
    from mlx_slim.data.sources import find
    from mlx_slim.models.load import load_tokenizer

    config = DataConfig(path=work.rows, validation=0)
    pipeline = Pipeline(config, load_tokenizer(work.model), max_length=work.max_length)
    source = find(config.sources[0])
    ledger = SourceLedger(source.name, source.kind, 1.0, source.ignored)
    rows = []
    for row in pipeline.rows(source, config.sources[0], ledger):
        ids, learned = row.tokens.ids_T.tolist(), row.tokens.supervised_T.tolist()
        targets = [token if yes else _IGNORED for token, yes in zip(ids, learned, strict=True)]
        rows.append((ids, targets))
    return rows


def _batches(torch: Any, rows: list[tuple[list[int], list[int]]], size: int) -> Iterator[Any]:
    """Yield ids, mask and targets (B, T), and the real tokens, of each batch of an epoch."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = [len(ids) for ids, _ in rows]
    generator = torch.Generator().manual_seed(0)
    order = list(LengthGroupedSampler(size, lengths=lengths, generator=generator))
    for start in range(0, len(order), size):
        chosen = [rows[index] for index in order[start : start + size]]
        longest = max(len(ids) for ids, _ in chosen)
        empty = [longest - len(ids) for ids, _ in chosen]
        pairs = list(zip(chosen, empty, strict=True))
        ids_BT = torch.tensor([ids + [0] * left for (ids, _), left in pairs])
        mask_BT = torch.tensor([[1] * len(ids) + [0] * left for (ids, _), left in pairs])
        targets_BT = torch.tensor([targets + [_IGNORED] * left for (_, targets), left in pairs])
        yield ids_BT, mask_BT, targets_BT, sum(len(ids) for ids, _ in chosen)


def peft(work: TrainWork) -> JsonObject:
    """Train one epoch with transformers and PEFT: AdamW, rows grouped by length."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if work.method == "qlora":
        raise SlimError(
            "PEFT trains over 4 bits with bitsandbytes, which needs a CUDA card",
            "use --method lora, dora or full",
        )
    torch, device = _device()
    model: Any = AutoModelForCausalLM.from_pretrained(
        work.model, dtype=_dtype(torch, work.dtype, device), use_safetensors=True
    )
    model = model.to(device)
    if work.method != "full":
        config = LoraConfig(
            r=RANK,
            lora_alpha=RANK * SCALE,
            lora_dropout=0.0,
            target_modules="all-linear",
            use_dora=work.method == "dora",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    rows = _rows(work)
    timed: list[tuple[int, float]] = []
    computed = 0
    reset_process_peak()
    for ids_BT, mask_BT, targets_BT, tokens in _batches(torch, rows, work.batch):
        begin = time.perf_counter()
        output = model(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            labels=targets_BT.to(device),
            use_cache=False,
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        output.loss.item()  # a GPU is done by then
        timed.append((tokens, time.perf_counter() - begin))
        computed += ids_BT.numel()
    return {
        **step_rates(timed[WARMUP_STEPS:]),
        "computed_tokens": computed,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "process_peak_bytes": process_peak_bytes(),
    }


def lm_eval(work: EvalWork) -> JsonObject:
    """Answer with the harness's own ``HFLM`` class, called directly."""
    from lm_eval.models.huggingface import HFLM

    task, questions, _ = read_questions(work)
    torch, device = _device()
    peer: Any = HFLM(
        pretrained=work.model,
        device=device,
        dtype=str(_dtype(torch, work.dtype, device)).removeprefix("torch."),
        batch_size=_SCORED_ROWS,
    )
    pairs = [pair for question in questions for pair in question.pairs]
    until = {"until": list(task.spec.until), "max_gen_toks": task.spec.max_tokens}
    until["do_sample"] = False
    reset_process_peak()
    begin = time.perf_counter()
    if pairs:
        requests: list[Any] = [SimpleNamespace(args=pair) for pair in pairs]
        scores = iter(peer.loglikelihood(requests, disable_tqdm=True))
        answers: list[Any] = [
            [value for value, _ in itertools.islice(scores, len(question.choices))]
            for question in questions
        ]
    else:
        requests = [SimpleNamespace(args=(each.context, dict(until))) for each in questions]
        answers = list(peer.generate_until(requests, disable_tqdm=True))
    seconds = time.perf_counter() - begin
    return {
        "questions_per_second": len(answers) / seconds,
        "seconds": seconds,
        "questions": len(answers),
        "answers": answers,
        "process_peak_bytes": process_peak_bytes(),
    }


def main() -> None:
    """Run the side named first with the work given as JSON; print one line of JSON."""
    name, work = sys.argv[1], json.loads(sys.argv[2])
    with contextlib.redirect_stdout(sys.stderr):
        result = peft(TrainWork(**work)) if name == "peft" else lm_eval(EvalWork(**work))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
