"""Attention: reference.py is the truth, sdpa.py, flex.py and fused.py are faster. Import the one that is meant."""
