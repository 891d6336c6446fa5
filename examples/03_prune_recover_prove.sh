#!/usr/bin/env bash
# Fewer attention heads and neurons, then training to get back what that cost, with scores of the
# original, the pruned and the recovered model in one report.
#
# Takes:   5 minutes on an M2 or on 4 CPU cores, 4 GB of memory, 1 GB of disk;
#          network: the model, once (0.3 GB)
# Prints:  parameters, perplexity and accuracy before, after pruning, and after recovery
# Note:    24 rows recover little. For a model that you mean to use, recover on thousands of rows,
#          or from the original with examples/04_two_teachers.sh
set -euo pipefail
MODEL=${MLX_SLIM_EXAMPLE_MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
STEPS=${MLX_SLIM_EXAMPLE_STEPS:-100}
OUT=${MLX_SLIM_EXAMPLE_OUT:-runs/examples}/03

mlx-slim prune "$MODEL" train.steps="$STEPS" --ratio 0.25 --calibration examples/data/text.txt \
  --held-out 256 --recover examples/small.yaml --task ./examples/capitals.yaml -o "$OUT"
