"""Ways out: fused models, PEFT adapters, GGUF files, model cards and uploads."""
