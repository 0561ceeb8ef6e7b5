"""What launch/lab.py does with a model: one file for each mode."""
