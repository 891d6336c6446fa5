#!/usr/bin/env bash
# A small model that learns from the logits of two larger ones. Teachers are loaded one after the
# other, before the student; their logits stay on disk, so a second run does not ask them again.
#
# Takes:   10 minutes on an M2, 5 GB of memory (the larger teacher in 16 bits), 0.3 GB of disk;
#          network: student and teachers, once (0.3 + 0.7 + 3.4 GB)
# Prints:  what each teacher predicts, the live view, validation loss with the divergence beside it
# Note:    logits need one tokenizer in all three; where it differs, use distill.method=sequence
set -euo pipefail
MODEL=${MLX_SLIM_EXAMPLE_MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
FIRST=${MLX_SLIM_EXAMPLE_TEACHER:-HuggingFaceTB/SmolLM2-360M-Instruct}
SECOND=${MLX_SLIM_EXAMPLE_TEACHER:-HuggingFaceTB/SmolLM2-1.7B-Instruct}
STEPS=${MLX_SLIM_EXAMPLE_STEPS:-100}
OUT=${MLX_SLIM_EXAMPLE_OUT:-runs/examples}/04

mlx-slim distill examples/small.yaml model="$MODEL" train.steps="$STEPS" distill.weight=0.7 \
  "distill.teachers=[{model: $FIRST, weight: 1.0}, {model: $SECOND, weight: 2.0}]" -o "$OUT"
