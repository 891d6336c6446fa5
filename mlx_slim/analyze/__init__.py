"""What was done to a model, in numbers: memory, fidelity."""
