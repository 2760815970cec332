"""`optimize`: packed weights on a CPU, CUDA graphs on a GPU."""
