#!/usr/bin/env bash
# A matrix of your own: models × methods × tasks from one file, one report with paired tests, and
# every published number recomputed from the stored answers.
#
# Takes:   5 minutes on an M2 or on 4 CPU cores, 3 GB of memory, 0.5 GB of disk;
#          network: the model, once (0.3 GB)
# Prints:  the plan, each cell as it runs, the headline; the page is OUT/report.html
# Stopped? Run it again: what is complete is kept.
set -euo pipefail
MODEL=${MLX_SLIM_EXAMPLE_MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
STEPS=${MLX_SLIM_EXAMPLE_STEPS:-60}
OUT=${MLX_SLIM_EXAMPLE_OUT:-runs/examples}/10
KEYS=(models.small.source="$MODEL" recipe.train.steps="$STEPS")

mlx-slim compare examples/10_matrix.yaml "${KEYS[@]}" --dry-run
mlx-slim compare examples/10_matrix.yaml "${KEYS[@]}" -o "$OUT" --resume
mlx-slim report "$OUT" --verify
