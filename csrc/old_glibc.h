// Included before everything else (setup.py). Binds what newer C libraries version anew to its first version, so that a
// binary from any GCC runs on glibc 2.28 and later, as wheels for manylinux_2_28 must.
#pragma once

#if defined(__linux__) && defined(__x86_64__)
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
__asm__(".symver exp2, exp2@GLIBC_2.2.5");
__asm__(".symver log2, log2@GLIBC_2.2.5");
#endif
