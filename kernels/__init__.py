"""One folder per op: the plain PyTorch reference and what is faster than it. Kept light: importing it imports nothing."""
