"""The decoder, its layers, the model families and their Hugging Face formats."""
