"""Against PyTorch: the real transformers and peft (extra ``parity``)."""
