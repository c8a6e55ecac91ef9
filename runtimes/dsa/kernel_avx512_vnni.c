/* AVX-512 with vpdpbusd: four int8 products per lane and instruction. */
#define VNNI
#include "kernel_avx512.c"
