"""The page of `launch/report.py`: what a run's folder holds, drawn."""
