/* Dense attention, `argv[1]` times, one head of 256 x 64: what an instruction counter is pointed at. */
#include "dsa.h"
#include <stdlib.h>

enum { N = 256, D = 64 };
static float q[N * D], k[N * D], v[N * D], out[N * D];

int main(int argc, char **argv) {
    dsa_config c = {.batch = 1, .q_heads = 1, .kv_heads = 1, .q_rows = N, .k_rows = N, .dim = D, .rank = 1};
    c.block_q = c.block_k = 64;
    const ptrdiff_t strides[3] = {N * D, N * D, D};
    dsa_tensor tq = {q, N * D, N * D, D}, tk = {k, N * D, N * D, D}, tv = {v, N * D, N * D, D};
    dsa_lengths all = {NULL, NULL};
    size_t bytes = dsa_workspace(&c, 1);
    void *work = malloc(bytes);
    for (int i = 0; i < N * D; i++) q[i] = k[i] = v[i] = (float)(i % 17) / 17;
    for (int i = 0; i < (argc > 1 ? atoi(argv[1]) : 1); i++)
        if (dsa_attend(&c, tq, tk, tv, NULL, NULL, all, work, bytes, NULL, out, strides)) return 1;
    free(work);
    return out[0] != out[0];
}
