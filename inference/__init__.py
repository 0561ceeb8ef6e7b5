"""The inference lab: the trainer's own models, served."""
