#include "dsa.h"
#include "kernels.h"

/* The set in use: the best one from the first call on (cpuid costs 50 us in a virtual machine), or dsa_limit's choice.
 * Threads that race here write the same pointer. */
static const dsa_kernel_set *chosen;

static int same(const char *a, const char *b) {
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

static const dsa_kernel_set *first(const char *name) {
    unsigned have = dsa_cpu();
#define DSA_KERNELS(set, needs, flags) \
    if ((have & (needs)) == (needs) && (!name || same(name, #set))) return &dsa_kernels_##set;
#include "kernels.inc"
#undef DSA_KERNELS
    return NULL;
}

const dsa_kernel_set *dsa_best(void) {
    const dsa_kernel_set *set = __atomic_load_n(&chosen, __ATOMIC_RELAXED);
    if (!set) __atomic_store_n(&chosen, set = first(NULL), __ATOMIC_RELAXED);
    return set;
}

const char *dsa_kernels(void) { return dsa_best()->name; }

int dsa_limit(const char *name) {
    const dsa_kernel_set *set = first(name);
    if (set) __atomic_store_n(&chosen, set, __ATOMIC_RELAXED);
    return set != NULL;
}
