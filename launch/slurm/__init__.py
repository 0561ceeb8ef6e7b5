"""SLURM: a batch script, what runs in it, and two ways to submit it. docs/SLURM.md says what is promised."""
