const AttentionKernels attention_kernels = {};
