"""Stop a run before it forgets: two brakes at once, from Python.

Early stopping ends a run when its validation loss rises; the forgetting watch ends it when a text
that has nothing to do with the rows becomes harder to predict than you allow, and keeps the weights
from before.

Takes:  3 minutes on an M2 or on 4 CPU cores, 3 GB of memory, 0.2 GB of disk;
        network: the model, once (0.3 GB)
Prints: validation losses, bits per byte of the text, why the run ended and which step was kept
Run:    python examples/09_stop_before_it_forgets.py
"""

import json
import os
from pathlib import Path

from mlx_slim import finetune

out = Path(os.environ.get("MLX_SLIM_EXAMPLE_OUT", "runs/examples")) / "09"
run = finetune(
    "examples/small.yaml",
    out,
    overrides={
        "model": os.environ.get("MLX_SLIM_EXAMPLE_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        "train.steps": int(os.environ.get("MLX_SLIM_EXAMPLE_STEPS", "200")),
        "train.validate_every": 2,
        "train.early_stopping": 6,  # steps without a better validation loss
        "forgetting.path": "examples/data/text.txt",
        "forgetting.every": 2,
        "forgetting.max_rise": 0.05,  # of bits per byte: 5%
    },
)
for line in (out / "metrics.jsonl").read_text().splitlines():
    event = json.loads(line)
    if event["event"] == "validation":
        print(f"step {event['step']}: validation loss {event['loss']:.4f}")
    elif "bits_per_byte" in event:
        print(f"step {event['step']}: the text takes {event['bits_per_byte']:.4f} bits a byte")
print(
    f"ended after step {run.done.step} ({run.done.reason}), weights of step {run.done.result_step}"
)
