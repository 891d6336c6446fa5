"""What of a model matters least, and how it leaves: layers, attention heads, MLP neurons."""
