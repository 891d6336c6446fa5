#!/usr/bin/env bash
# What do 4 bits cost? The same questions to both models, and a paired test.
#
# Takes:   2 minutes on an M2 or on 4 CPU cores, 2 GB of memory, 0.1 GB of disk;
#          network: the model, once (0.3 GB)
# Prints:  bits per weight and fidelity, a table of scores for each model, the paired comparison
# Yours:   --task hellaswag,arc_easy --limit 500 (those need the hub); differences of a few points
#          need hundreds of questions: the comparison says which difference it could have seen
set -euo pipefail
MODEL=${MLX_SLIM_EXAMPLE_MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
OUT=${MLX_SLIM_EXAMPLE_OUT:-runs/examples}/02
ASK=(--task ./examples/capitals.yaml --perplexity examples/data/text.txt)

mlx-slim quantize "$MODEL" -o "$OUT/four-bit" --bits 4 --calibration examples/data/text.txt
mlx-slim eval "$MODEL" "${ASK[@]}" -o "$OUT/float"
mlx-slim eval "$OUT/four-bit" "${ASK[@]}" -o "$OUT/rounded"
mlx-slim eval --compare "$OUT/float" "$OUT/rounded"
