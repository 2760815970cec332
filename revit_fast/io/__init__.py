"""Helpers that need no model: reading images, writing files, timing and memory."""
