"""Reading images, writing files, timing and memory: what needs no model."""
