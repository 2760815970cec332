const ResizeKernels resize_kernels = {};
