"""Streams: images are packed by their tokens, run through a model and returned as results."""
