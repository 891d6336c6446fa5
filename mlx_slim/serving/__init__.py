"""mlx-lm's OpenAI-compatible server with this package's loading."""
