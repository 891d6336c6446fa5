"""Tiny real models, a byte tokenizer and small helpers: what the tests use instead of mocks."""
