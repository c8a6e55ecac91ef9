/* Multiply-adds in registers only: the ceiling of this core. 12 independent vectors, 2 operations per lane and step.
 * They start at values the compiler does not know: one that starts at the fixed point 1 = 1 * x + y would be left out. */
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vec __attribute__((vector_size(BYTES)));

const int peak_operations = 12 * BYTES / 4 * 2; /* per step */

float peak(long steps) {
    vec a[12], x = (vec){0} + 0.999f, y = (vec){0} + 1e-3f, sum = {0};
    for (int i = 0; i < 12; i++) a[i] = (vec){0} + (float)(steps + i);
    for (long t = 0; t < steps; t++)
        for (int i = 0; i < 12; i++) a[i] = a[i] * x + y;
    for (int i = 0; i < 12; i++) sum += a[i];
    return sum[0];
}
