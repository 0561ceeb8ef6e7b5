"""Causal attention: reference.py is the truth, sdpa.py and flex.py are faster. Import the one that is meant."""
