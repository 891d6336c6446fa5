#!/usr/bin/env bash
# A run is killed in the middle and resumed: its later losses are those of the run that nobody
# killed, bit for bit.
#
# Takes:   3 minutes on an M2 or on 4 CPU cores, 3 GB of memory, 0.2 GB of disk;
#          network: the model, once (0.3 GB)
# Prints:  both runs, then how many losses are equal
set -euo pipefail
MODEL=${MLX_SLIM_EXAMPLE_MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
STEPS=${MLX_SLIM_EXAMPLE_STEPS:-40}
OUT=${MLX_SLIM_EXAMPLE_OUT:-runs/examples}/06
RECIPE=(examples/small.yaml model="$MODEL" train.steps="$STEPS" train.save_every=2)

mlx-slim train "${RECIPE[@]}" -o "$OUT/undisturbed" --quiet

mlx-slim train "${RECIPE[@]}" -o "$OUT/killed" --quiet &
while [ -z "$(ls "$OUT/killed/checkpoints" 2>/dev/null)" ] && kill -0 $! 2>/dev/null; do sleep 0.02; done
kill -9 $! 2>/dev/null || true
wait $! 2>/dev/null || true
mlx-slim train "${RECIPE[@]}" -o "$OUT/killed" --resume --quiet

losses() { grep '"event": "step"' "$1/metrics.jsonl" | sed 's/.*"loss": \([^,]*\),.*/\1/'; }
if ! diff <(losses "$OUT/undisturbed") <(losses "$OUT/killed"); then
  echo "the losses differ: that would be a bug" >&2
  exit 1
fi
echo "$(losses "$OUT/killed" | wc -l | tr -d ' ') losses, all equal to those of the undisturbed run"
