#!/usr/bin/env bash
# From a CSV file of questions and answers to a model that Ollama runs.
#
# Takes:   3 minutes on an M2 or on 4 CPU cores, 3 GB of memory, 0.8 GB of disk;
#          network: the model, once (0.3 GB)
# Prints:  rows as the model reads them, the live view of training, one answer, the Ollama command
# Yours:   CSV=mine.csv bash examples/01_csv_to_ollama.sh
#          (columns question,answer or prompt,completion or instruction,input,output)
set -euo pipefail
MODEL=${MLX_SLIM_EXAMPLE_MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
STEPS=${MLX_SLIM_EXAMPLE_STEPS:-100}
OUT=${MLX_SLIM_EXAMPLE_OUT:-runs/examples}/01
CSV=${CSV:-examples/data/support.csv}

mlx-slim data preview examples/small.yaml model="$MODEL" data.path="$CSV"
mlx-slim train examples/small.yaml model="$MODEL" data.path="$CSV" train.steps="$STEPS" -o "$OUT/run"
mlx-slim generate "$MODEL" --adapter "$OUT/run/adapters" --max-tokens 40 --prompt "How large may a file be?"
mlx-slim export "$OUT/run" --to ollama --type q8_0 -o "$OUT/ollama" --calibration examples/data/text.txt
echo "now: ollama create support -f $OUT/ollama/Modelfile && ollama run support"
