"""One folder per op: the plain PyTorch reference and what is faster than it. Importing this imports nothing."""
