#!/usr/bin/env bash
# DPO on pairs whose difference a program can check: dates with the day first ("4 March 2021") are
# preferred. The held-out pairs are about other things, in other sentences.
#
# Takes:   3 minutes on an M2 or on 4 CPU cores, 2 GB of memory, 0.1 GB of disk;
#          network: the model, once (0.3 GB)
# Prints:  how many held-out pairs the model has the right way round before, and during training
#          (policy/accuracies), the margin of the rewards, bits per byte of another text
set -euo pipefail
MODEL=${MLX_SLIM_EXAMPLE_MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
STEPS=${MLX_SLIM_EXAMPLE_STEPS:-36}
OUT=${MLX_SLIM_EXAMPLE_OUT:-runs/examples}/12

python examples/date_pairs.py "$OUT/rows"
mlx-slim train smollm2-dpo model="$MODEL" revision=null data.path="$OUT/rows/train.jsonl" \
  data.validation="$OUT/rows/validation.jsonl" forgetting.path=examples/data/text.txt \
  forgetting.max_rise=0.1 train.max_length=128 train.batch_tokens=1024 train.accumulate=1 \
  train.learning_rate=2e-4 train.steps="$STEPS" -o "$OUT/run"
