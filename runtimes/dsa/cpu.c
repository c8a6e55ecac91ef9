#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>

enum { OSXSAVE = 1 << 27, FMA = 1 << 12 };                              /* leaf 1, ecx */
enum { AVX2 = 1 << 5, F_DQ = 1 << 16 | 1 << 17, BW = 1 << 30 };         /* leaf 7, ebx; VL is bit 31 */
enum { SAVES_YMM = 0x6, SAVES_ZMM = 0xe6, VNNI = 1 << 11 };             /* xcr0; leaf 7, ecx */

/* By hand: __builtin_cpu_supports needs a run-time table that zig's libraries do not fill (it says no to all). */
unsigned dsa_cpu(void) {
    unsigned a, b, c, d, fma, low, high, have = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return 0; /* the system does not save vector state */
    fma = c & FMA;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if ((low & SAVES_YMM) == SAVES_YMM && fma && (b & AVX2)) have |= DSA_CPU_AVX2;
    if ((low & SAVES_ZMM) == SAVES_ZMM && (b & F_DQ) == F_DQ && (b & BW) && b >> 31) {
        have |= DSA_CPU_AVX512;
        if (c & VNNI) have |= DSA_CPU_VNNI;
    }
    return have;
}

#elif defined(__aarch64__)
/* NEON is part of the armv8-a baseline; only the dot products must be asked for. Declared by hand: a freestanding
 * compiler has no sys/auxv.h or sys/sysctl.h, and the app's own libc resolves the names at link time. */
#if defined(__linux__) /* Android included */
unsigned long getauxval(unsigned long type);
enum { HWCAP = 16, HWCAP_ASIMDDP = 1 << 20 };
static int dotprod(void) { return (getauxval(HWCAP) & HWCAP_ASIMDDP) != 0; }
#elif defined(__APPLE__)
int sysctlbyname(const char *name, void *old, size_t *size, void *given, size_t given_size);
static int dotprod(void) {
    int32_t yes = 0;
    size_t size = sizeof yes;
    return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &yes, &size, NULL, 0) && yes;
}
#else
static int dotprod(void) { return 0; }
#endif

unsigned dsa_cpu(void) { return DSA_CPU_NEON | (dotprod() ? DSA_CPU_DOTPROD : 0); }
#else
unsigned dsa_cpu(void) { return 0; }
#endif
