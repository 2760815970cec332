const TokenKernels token_kernels = {};
