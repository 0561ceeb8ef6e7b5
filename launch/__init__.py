"""Entry points: configuration in, one call out."""
