"""Streams of images to results, in packs by tokens."""
