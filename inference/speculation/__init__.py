"""Speculative decoding: several tokens of a sequence for one pass of the model, with the model's own distribution."""
