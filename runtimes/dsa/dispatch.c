#include "dsa.h"
#include "kernels.h"

static const dsa_kernel_set *limit; /* set only by tests */

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

const dsa_kernel_set *dsa_best(void) { return limit ? limit : first(NULL); }

const char *dsa_kernels(void) { return dsa_best()->name; }

int dsa_limit(const char *name) {
    const dsa_kernel_set *found = name ? first(name) : NULL;
    if (name && !found) return 0;
    limit = found;
    return 1;
}
