#!/usr/bin/env bash
# QLoRA over a 4-bit base, then out of here: the adapter to PEFT, and base and adapter together to
# GGUF for llama.cpp, LM Studio and Ollama.
#
# Takes:   3 minutes on an M2 or on 4 CPU cores, 2 GB of memory, 0.8 GB of disk;
#          network: the model, once (0.3 GB)
# Prints:  the live view, the audit of the merge, what to type in PEFT and llama.cpp
# Larger:  MLX_SLIM_EXAMPLE_MODEL=mistralai/Mistral-7B-v0.3 fits a Mac with 16 GB
#          (mlx-slim plan mistral-qlora says what it takes)
set -euo pipefail
MODEL=${MLX_SLIM_EXAMPLE_MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
STEPS=${MLX_SLIM_EXAMPLE_STEPS:-100}
OUT=${MLX_SLIM_EXAMPLE_OUT:-runs/examples}/08

mlx-slim train examples/small.yaml model="$MODEL" method=qlora train.steps="$STEPS" -o "$OUT/run"
mlx-slim export "$OUT/run" --to peft -o "$OUT/peft"
# The adapter was trained over the rounded base, so that is what it is merged into.
mlx-slim fuse "$OUT/run/base" --adapter "$OUT/run/adapters" --dequantize -o "$OUT/fused" \
  --calibration examples/data/text.txt
mlx-slim export "$OUT/fused" --to gguf --type q8_0 -o "$OUT/gguf" --calibration examples/data/text.txt
