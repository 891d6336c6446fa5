#!/usr/bin/env bash
# Score a model on questions of your own: examples/capitals.yaml says where the rows are, what is
# asked, and what is right.
#
# Takes:   1 minute, 1 GB of memory; network: the model, once (0.3 GB)
# Prints:  the task and its first prompt as the model gets it, a table of scores
# Then:    every answer stands in samples_capitals.jsonl, one question a line
set -euo pipefail
MODEL=${MLX_SLIM_EXAMPLE_MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
OUT=${MLX_SLIM_EXAMPLE_OUT:-runs/examples}/05

mlx-slim tasks ./examples/capitals.yaml
mlx-slim eval "$MODEL" --task ./examples/capitals.yaml -o "$OUT"
head -n 2 "$OUT/samples_capitals.jsonl"
