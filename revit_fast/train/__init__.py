"""Training of ReViT: image sets, loaders, losses and loops."""
