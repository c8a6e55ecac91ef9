// What every binding shares: the operator's attributes and operands in schema order, the check of shapes, the workspace,
// and a journal of the calls that proves which path ran. C types only; no C++ library, so that any runtime can load it.
#pragma once
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "dsa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Integer attributes that are fields of dsa_config, with the schema's defaults. `scale` is the only float.
#define DSA_INTS(X)                                                                                                   \
    X(block_q, 64) X(block_k, 64) X(rule, 0) X(min_blocks, 1) X(max_blocks, 0) X(force_diag, 1) X(n_sink, 0)           \
    X(causal, 0) X(q_offset, 0) X(select_per_kv, 0) X(dense_below, 0) X(compute, 0)

namespace edgeformer {

enum operand { Q, K, V, WQ, WK, DIST, SINK, THETA, Q_LEN, KV_LEN, POSITION, OPERANDS };

static inline bool is_length(int64_t i) { return i == Q_LEN || i == KV_LEN; }

// A contiguous operand as the runtime shows it. No data and rank 0: absent, as those from Q_LEN on may be.
struct view {
    const void *data;
    int64_t dims[4];
    int64_t rank;
};

static inline dsa_config defaults() {
    dsa_config c;
    memset(&c, 0, sizeof c);
#define X(name, value) c.name = value;
    DSA_INTS(X)
#undef X
    return c;
}

static inline bool has(const view &x, int64_t rank, int64_t a, int64_t b = -1, int64_t c = -1, int64_t d = -1) {
    const int64_t want[4] = {a, b, c, d};
    if (x.rank != rank) return false;
    for (int i = 0; i < rank; i++)
        if (want[i] >= 0 && x.dims[i] != want[i]) return false;
    return true;
}

static inline bool small(const view &x) {
    for (int i = 0; i < x.rank; i++)
        if (x.dims[i] > INT32_MAX) return false;
    return true;
}

// Fills the sizes of the config from the operands. Returns what is wrong with them, or NULL.
static inline const char *sizes(dsa_config *c, const view in[OPERANDS]) {
    const view &q = in[Q], &k = in[K];
    for (int i = 0; i < OPERANDS; i++)
        if (!small(in[i])) return "a dimension is above 2^31";
    if (q.rank != 4 || k.rank != 4) return "q and k: [batch, heads, rows, dim]";
    if (k.dims[0] != q.dims[0] || k.dims[3] != q.dims[3]) return "k: the batch and the dim of q";
    if (!has(in[V], 4, k.dims[0], k.dims[1], k.dims[2], k.dims[3])) return "v: the shape of k";
    if (!has(in[WQ], 3, q.dims[1], q.dims[3])) return "wq: [q_heads, dim, rank]";
    if (!has(in[WK], 3, q.dims[1], q.dims[3], in[WQ].dims[2])) return "wk: the shape of wq";
    if (!has(in[DIST], 2, q.dims[1]) || in[DIST].dims[1] % 2 == 0) return "dist_bias: [q_heads, 2 R + 1]";
    if (!has(in[SINK], 2, q.dims[1])) return "sink_bias: [q_heads, S]";
    if (!has(in[THETA], 1, c->select_per_kv ? k.dims[1] : q.dims[1])) return "theta: one value per list of heads";
    for (int i = Q_LEN; i <= KV_LEN; i++)
        if (in[i].data && !has(in[i], 1, q.dims[0])) return "q_len and kv_len: [batch]";
    if (in[POSITION].rank && (!has(in[POSITION], 2, q.dims[1]) || in[POSITION].dims[1] % 2 == 0))
        return "position_bias: [q_heads, 2 P + 1]";
    c->batch = (int32_t)q.dims[0], c->q_heads = (int32_t)q.dims[1];
    c->q_rows = (int32_t)q.dims[2], c->dim = (int32_t)q.dims[3];
    c->kv_heads = (int32_t)k.dims[1], c->k_rows = (int32_t)k.dims[2];
    if (c->q_offset == -1) c->q_offset = c->k_rows - c->q_rows;  // the queries are the last of the keys' rows
    c->rank = (int32_t)in[WQ].dims[2], c->dist = (int32_t)in[DIST].dims[1] / 2, c->sinks = (int32_t)in[SINK].dims[1];
    c->positions = in[POSITION].rank ? (int32_t)in[POSITION].dims[1] / 2 : 0;
    c->position_bias = (const float *)in[POSITION].data;
    return dsa_why(c);
}

// The workspace is kept between calls: fresh pages for every layer would cost more than a short attention. Whoever finds
// the place empty (two sessions at once) allocates his own, and the last one to give back leaves his there.
struct block {
    size_t bytes;
};
static block *spare;

static inline block *borrow(size_t bytes) {
    block *b = __atomic_exchange_n(&spare, (block *)NULL, __ATOMIC_ACQ_REL);
    if (b && b->bytes >= bytes) return b;
    free(b);
    b = (block *)malloc(sizeof(block) + bytes);
    if (b) b->bytes = bytes;
    return b;
}

static inline void give_back(block *b) { free(__atomic_exchange_n(&spare, b, __ATOMIC_ACQ_REL)); }

// The last calls, oldest first: what each kept of how many candidates. A graph runs its layers in order.
enum { JOURNAL = 1024 };
static pthread_mutex_t journal_lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t journal_calls, journal[JOURNAL][2];

static inline void record(const int64_t kept[2]) {
    pthread_mutex_lock(&journal_lock);
    memcpy(journal[journal_calls++ % JOURNAL], kept, sizeof journal[0]);
    pthread_mutex_unlock(&journal_lock);
}

// One call of the operator. Returns NULL, or what went wrong in words.
static inline const char *call(const dsa_config *c, const view in[OPERANDS], const dsa_parallel *p, float *out) {
    auto tensor = [&](operand i) {
        const int64_t *d = in[i].dims;
        return dsa_tensor{(const float *)in[i].data, (ptrdiff_t)(d[1] * d[2] * d[3]), (ptrdiff_t)(d[2] * d[3]), (ptrdiff_t)d[3]};
    };
    auto data = [&](operand i) { return (const float *)in[i].data; };
    const dsa_scorer s = {data(WQ), data(WK), data(DIST), data(SINK), data(THETA)};
    const dsa_lengths len = {(const int32_t *)in[Q_LEN].data, (const int32_t *)in[KV_LEN].data};
    const ptrdiff_t strides[3] = {tensor(Q).batch, tensor(Q).head, tensor(Q).row};
    block *work = borrow(dsa_workspace(c, p ? p->threads : 1));
    if (!work) return "out of memory for the workspace";
    int64_t kept[2];
    const dsa_status status =
        dsa_fused(c, tensor(Q), tensor(K), tensor(V), &s, len, work + 1, work->bytes, p, out, strides, kept);
    give_back(work);
    if (status != DSA_OK) return dsa_why(c) ? dsa_why(c) : "the core refused the call";
    record(kept);
    return NULL;
}

// For a runtime whose pool only offers "run f(i) for i below n": each of `threads` slots takes tasks until none is left.
struct slots {
    void (*task)(void *, int32_t, int32_t);
    void *arg;
    int32_t tasks, next;
    void work(int32_t slot) {
        for (int32_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) task(arg, i, slot);
    }
};

}  // namespace edgeformer

EXPORT int64_t edgeformer_dsa_calls() {
    pthread_mutex_lock(&edgeformer::journal_lock);
    const int64_t calls = edgeformer::journal_calls;
    pthread_mutex_unlock(&edgeformer::journal_lock);
    return calls;
}

EXPORT void edgeformer_dsa_reset() {
    pthread_mutex_lock(&edgeformer::journal_lock);
    edgeformer::journal_calls = 0;
    pthread_mutex_unlock(&edgeformer::journal_lock);
}

// Copies the last calls (at most `most`) as pairs of kept and candidate blocks, oldest first; returns how many.
EXPORT int32_t edgeformer_dsa_kept(int32_t most, int64_t *pairs) {
    using namespace edgeformer;
    pthread_mutex_lock(&journal_lock);
    int64_t n = journal_calls < JOURNAL ? journal_calls : JOURNAL;
    n = n < most ? n : most;
    for (int64_t i = 0; i < n; i++) memcpy(pairs + 2 * i, journal[(journal_calls - n + i) % JOURNAL], sizeof journal[0]);
    pthread_mutex_unlock(&journal_lock);
    return (int32_t)n;
}

EXPORT const char *edgeformer_dsa_kernels() { return dsa_kernels(); }
