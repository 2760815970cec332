"""Training a ReViT and its assigner: data, losses, loops, labels, evaluation."""
