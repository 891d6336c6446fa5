"""Tests of ``mlx_slim/finetuning/``."""
