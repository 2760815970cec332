const LayerNormKernels layer_norm_kernels = {};
