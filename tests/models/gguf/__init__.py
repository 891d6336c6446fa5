"""Tests of ``mlx_slim/models/gguf/``."""
