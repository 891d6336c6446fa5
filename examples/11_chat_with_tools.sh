#!/usr/bin/env bash
# Chats with tool calls: the schema, the call, the tool's reply and the answer go through a chat
# template, and only what the assistant says is learned, the call included.
#
# Takes:   2 minutes on an M2 or on 4 CPU cores, 3 GB of memory, 0.2 GB of disk;
#          network: the model, once (0.3 GB)
# Prints:  a chat as the model reads it with what is learned marked, the live view of training
# Note:    SmolLM2's template knows no tools and is refused for such rows; data.template names one
#          that does. A model with a template for tools (Qwen2.5, Llama 3.2) needs no such line.
set -euo pipefail
MODEL=${MLX_SLIM_EXAMPLE_MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
STEPS=${MLX_SLIM_EXAMPLE_STEPS:-60}
OUT=${MLX_SLIM_EXAMPLE_OUT:-runs/examples}/11
KEYS=(model="$MODEL" data.path=examples/data/tools.jsonl data.template=examples/data/tools.jinja
      data.validation=1 train.max_length=1024 train.steps="$STEPS")

mlx-slim data preview examples/small.yaml "${KEYS[@]}"
mlx-slim train examples/small.yaml "${KEYS[@]}" -o "$OUT"
