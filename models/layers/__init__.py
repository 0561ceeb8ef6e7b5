"""Layer types a decoder is made of."""
