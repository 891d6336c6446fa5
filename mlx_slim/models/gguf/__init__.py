"""GGUF files: header, tensors, vocabulary and tokenizer, read and written."""
