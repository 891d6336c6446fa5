"""Forward passes behind scores: log-likelihoods, generated answers, perplexity."""
