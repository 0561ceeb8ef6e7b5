"""From text to batches: sources, tokenizers, packing, loading."""
