"""Low-rank adapters: LoRA, DoRA and their variants, put into a model, stored and merged."""
