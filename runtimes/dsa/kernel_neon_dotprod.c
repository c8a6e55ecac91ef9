/* NEON with sdot (Cortex-A76 and later): four int8 products per lane and instruction. */
#define DOTPROD
#include "kernel_neon.c"
