"""Other projects training the shapes of configs/model, measured as benchmarks/train.py measures this one.

Each program runs under torchrun, on random weights and tokens, downloads nothing, and prints one JSON object.
benchmarks/compare.py runs them beside this project's own configuration.
"""
