"""What benchmarks/kernels.py measures: a file per op with `problems()`."""
