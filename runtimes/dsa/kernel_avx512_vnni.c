/* AVX-512 with vpdpbusd: four int8 products per lane and instruction. */
#include "kernel_avx512.c"
