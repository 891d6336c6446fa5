"""Hyperparameter search on validation loss: space, trials, study, conclusion, page."""
