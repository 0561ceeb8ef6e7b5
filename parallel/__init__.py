"""Parallel layouts: degrees, meshes, and what is applied to a model from outside."""
