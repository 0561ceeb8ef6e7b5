"""The cost of a run before it runs: bytes, FLOPs, traffic and time of a configuration, by arithmetic alone."""
