/* The portable core: what is selected, in which order it is attended, where it lies in the workspace.
 * No libc header: the same file compiles freestanding for Android and iOS. */
#include "dsa.h"
#include "kernels.h"

/* Off, so that every CPU computes the same bits in selection: the kept blocks do not depend on the device. */
#pragma STDC FP_CONTRACT OFF

#define LOG2_E 1.44269504088896f
#define MOST 3e38f
#define NONE (-__builtin_inff())
#define MAX_STRIP 64  /* queries: four vectors of AVX-512 */
#define MAX_STRIPS 16 /* of a query block: 128 rows by two vectors of NEON */
#define MAX_BLOCK 128 /* keys */
#define PANEL 8       /* query blocks that are scored together */

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t largest(int32_t a, int32_t b) { return a > b ? a : b; }
static int32_t blocks(int32_t rows, int32_t block) { return rows / block + (rows % block != 0); }
static int32_t q_blocks(const dsa_config *c) { return blocks(c->q_rows, c->block_q); }
static int32_t k_blocks(const dsa_config *c) { return blocks(c->k_rows, c->block_k); }
static int32_t list_heads(const dsa_config *c) { return c->select_per_kv ? c->kv_heads : c->q_heads; }

static const char *why_blocks(const dsa_config *c) {
    if (c->block_q < 16 || c->block_q > 128 || c->block_q % 16) return "block_q: 16 to 128, a multiple of 16";
    if (c->block_k < 16 || c->block_k > 128 || c->block_k % 16) return "block_k: 16 to 128, a multiple of 16";
    if (c->rule < DSA_THRESHOLD || c->rule > DSA_TOP_K) return "rule: 0 threshold, 1 top_p or 2 top_k";
    if (c->min_blocks < 0) return "min_blocks: not negative";
    if (c->max_blocks < 0) return "max_blocks: not negative (0 is no clamp)";
    if (c->n_sink < 0) return "n_sink: not negative";
    if (c->q_offset < 0) return "q_offset: not negative";
    if (c->q_offset > INT32_MAX - 256 - c->q_rows) return "q_offset: positions beyond 2^31";
    return NULL;
}

/* Tasks are counted in 32 bits. */
static int too_many(const dsa_config *c) {
    int64_t heads = (int64_t)c->batch * c->q_heads;
    return heads > INT32_MAX || heads * q_blocks(c) > INT32_MAX || heads * k_blocks(c) > INT32_MAX;
}

const char *dsa_why(const dsa_config *c) {
    if (c->batch < 1) return "batch: at least 1";
    if (c->kv_heads < 1) return "kv_heads: at least 1";
    if (c->q_heads < 1 || c->q_heads % c->kv_heads) return "q_heads: a multiple of kv_heads, at least 1";
    if (c->q_rows < 1 || c->q_rows > 1 << 28) return "q_rows: 1 to 2^28";
    if (c->k_rows < 1 || c->k_rows > 1 << 28) return "k_rows: 1 to 2^28";
    if (c->dim < 16 || c->dim > 256 || c->dim % 16) return "dim: 16 to 256, a multiple of 16";
    if (c->rank < 1 || c->rank > 256) return "rank: 1 to 256";
    if (c->dist < 0 || c->dist > 1 << 20) return "dist: 0 to 2^20";
    if (c->sinks < 0) return "sinks: not negative";
    if (c->compute == DSA_BF16) return "compute: bf16 is not in version 1; use f32 or i8";
    if (c->compute != DSA_F32 && c->compute != DSA_I8) return "compute: 0 f32 or 1 i8";
    if (c->positions < 0 || c->positions > 1 << 20) return "positions: 0 to 2^20";
    if (why_blocks(c)) return why_blocks(c);
    return too_many(c) ? "batch: batch * q_heads * blocks must stay below 2^31" : NULL;
}

static dsa_status status_of(const dsa_config *c) {
    if (!dsa_why(c)) return DSA_OK;
    return c->compute == DSA_BF16 ? DSA_UNSUPPORTED : DSA_BAD_CONFIG;
}

int32_t dsa_kmax(const dsa_config *c) {
    int32_t n = k_blocks(c);
    return c->max_blocks ? least(c->max_blocks, n) : n;
}

/* ---- Workspace: one bump allocator, run once with base 0 to measure and once to place. */

typedef struct {
    char *base;
    size_t used;
} arena;

static void *take(arena *a, size_t bytes) {
    void *at = a->base ? a->base + a->used : NULL;
    a->used += (bytes + 63) & ~(size_t)63;
    return at;
}

typedef struct {
    int32_t *idx, *cnt;    /* fused only */
    float *k_mean;         /* select: [batch][kv_heads][nK][dim] */
    char *packed;          /* i8: [places][packed_bytes] */
    float *k_copy, *v_copy; /* f32, optional: [batch][kv_heads][nK * block_k][dim] */
    char *thread;          /* [threads][thread_bytes] */
    size_t thread_bytes, packed_bytes, needed; /* of one thread; of one place; of all but the copies */
    int32_t places, shared;                    /* shared: the first place that all threads see */
} memory;

/* i8: the keys and values of one (batch, kv head). */
typedef struct {
    float *k_shift, *v_scale; /* [dim] each */
    float *k_scale;           /* [nK] */
    int8_t *k8, *v8;          /* [nK][block_k * dim] each */
    int32_t *v_sum;           /* [nK][dim] */
} packed;

static packed packed_layout(arena *a, const dsa_config *c) {
    packed p;
    size_t n = (size_t)k_blocks(c), dim = (size_t)c->dim, bytes = n * (size_t)c->block_k * dim;
    p.k_shift = take(a, 4 * dim);
    p.v_scale = take(a, 4 * dim);
    p.k_scale = take(a, 4 * n);
    p.k8 = take(a, bytes);
    p.v8 = take(a, bytes);
    p.v_sum = take(a, 4 * n * dim);
    return p;
}

static int32_t kv_pairs(const dsa_config *c) { return c->batch * c->kv_heads; }

/* Per thread, selecting one list. */
typedef struct {
    float *zk, *zq; /* [heads of the list][rank][row_of_z], [heads of the list][nQ][rank] */
    float *mean;    /* [nQ][dim] */
    float *z, *mass; /* [PANEL][row_of_z] */
    int32_t *heap;
} select_scratch;

/* Scores of a query block: nK of them, rounded up to what is whole vectors everywhere. */
static size_t row_of_z(const dsa_config *c) { return ((size_t)k_blocks(c) + 15) & ~(size_t)15; }

static select_scratch select_layout(arena *a, const dsa_config *c) {
    select_scratch s;
    size_t shared = (size_t)(c->q_heads / list_heads(c)), rank = (size_t)c->rank, n = row_of_z(c);
    s.zk = take(a, 4 * shared * rank * n);
    s.zq = take(a, 4 * shared * rank * (size_t)q_blocks(c));
    s.mean = take(a, 4 * (size_t)q_blocks(c) * (size_t)c->dim);
    s.z = take(a, 4 * PANEL * n);
    s.mass = take(a, 4 * PANEL * n);
    s.heap = take(a, 4 * n);
    return s;
}

/* Per thread, attending: one query block as strips, and its logits against one key block. */
typedef struct {
    float *q, *o, *s, *high, *top, *sum, *alpha, *beta, *q_scale;
    int32_t *p8, *q_sum;
} attend_scratch;

static attend_scratch attend_layout(arena *a, const dsa_config *c) {
    attend_scratch s;
    size_t rows = ((size_t)c->block_q + MAX_STRIP - 1) / MAX_STRIP * MAX_STRIP, dim = (size_t)c->dim;
    s.q = take(a, 4 * rows * dim);
    s.o = take(a, 4 * rows * dim);
    s.s = take(a, 4 * ((size_t)c->block_k * rows + 16)); /* a tile may load a few lanes past the last */
    s.p8 = take(a, c->compute == DSA_I8 ? (size_t)c->block_k * rows + 64 : 0);
    s.high = take(a, 4 * MAX_STRIP);
    s.alpha = take(a, 4 * rows);
    s.beta = take(a, 4 * rows);
    s.top = take(a, 4 * rows);
    s.sum = take(a, 4 * rows);
    s.q_scale = take(a, 4 * rows);
    s.q_sum = take(a, 4 * rows);
    return s;
}

static memory layout(arena *a, const dsa_config *c, int32_t threads) {
    memory m;
    size_t kv = (size_t)c->batch * (size_t)c->kv_heads, n = (size_t)k_blocks(c), dim = (size_t)c->dim;
    size_t lists = (size_t)c->batch * (size_t)list_heads(c) * (size_t)q_blocks(c), bk = (size_t)c->block_k;
    size_t i8 = c->compute == DSA_I8;
    m.idx = take(a, 4 * lists * (size_t)dsa_kmax(c));
    m.cnt = take(a, 4 * lists);
    m.k_mean = take(a, 4 * kv * n * dim);
    arena one = {NULL, 0}, other = {NULL, 0}, third = {NULL, 0};
    select_layout(&one, c);
    attend_layout(&other, c);
    packed_layout(&third, c);
    /* A thread that does whole heads packs each where the last one was: the place stays near. */
    m.shared = threads > 1 ? threads : 0;
    m.places = least(kv_pairs(c), threads > 1 ? 2 * threads : 1);
    m.packed_bytes = i8 * third.used;
    m.packed = take(a, (size_t)m.places * m.packed_bytes);
    m.thread_bytes = one.used > other.used ? one.used : other.used;
    m.thread = take(a, (size_t)threads * m.thread_bytes);
    m.needed = a->used;
    m.k_copy = take(a, (1 - i8) * 4 * kv * n * bk * dim);
    m.v_copy = take(a, (1 - i8) * 4 * kv * n * bk * dim);
    return m;
}

size_t dsa_workspace(const dsa_config *c, int32_t threads) {
    arena a = {NULL, 0};
    if (dsa_why(c)) return 0;
    return layout(&a, c, largest(threads, 1)).needed + 64; /* the caller's pointer may have any alignment */
}

size_t dsa_workspace_strided(const dsa_config *c, int32_t threads) {
    arena a = {NULL, 0};
    if (dsa_why(c)) return 0;
    layout(&a, c, largest(threads, 1));
    return a.used + 64;
}

/* ---- One call: everything a task needs. */

typedef struct {
    const dsa_config *c;
    const dsa_kernel_set *set;
    dsa_tensor q, k, v;
    const dsa_scorer *scorer;
    dsa_lengths len;
    memory m;
    int32_t *idx, *cnt;
    const int32_t *kept_idx, *kept_cnt;
    float *out;
    const ptrdiff_t *out_strides;
    float scale;   /* of the logits, which are in log2 */
    int pooled;    /* m.k_mean holds the means of the key blocks */
    int32_t whole; /* heads that one task does from start to end */
} call;

typedef void task(void *arg, int32_t i, int32_t thread);

static int32_t threads_of(const dsa_parallel *p) { return p && p->run ? largest(p->threads, 1) : 1; }

static void run(const dsa_parallel *p, int32_t tasks, task *t, const call *arg) {
    if (threads_of(p) > 1 && tasks > 1) {
        p->run(p->pool, tasks, t, (void *)(uintptr_t)arg);
        return;
    }
    for (int32_t i = 0; i < tasks; i++) t((void *)(uintptr_t)arg, i, 0);
}

/* Newton's square root: sqrtf would be a libc call. */
static float scale_of(const dsa_config *c) {
    double root = c->dim;
    if (c->scale != 0) return c->scale;
    for (int32_t i = 0; i < 16; i++) root = (root + c->dim / root) / 2;
    return (float)(1 / root);
}

static dsa_status begin(call *a, const dsa_config *c, void *work, size_t bytes, const dsa_parallel *p) {
    dsa_status status = status_of(c);
    if (status) return status;
    int32_t threads = p ? largest(p->threads, 1) : 1;
    if (bytes < dsa_workspace(c, threads)) return DSA_SMALL_WORKSPACE;
    arena place = {(char *)work + (64 - (uintptr_t)work % 64) % 64, 0};
    a->c = c;
    a->set = dsa_best();
    a->scale = scale_of(c) * LOG2_E;
    a->m = layout(&place, c, threads);
    if (c->compute != DSA_F32 || bytes < dsa_workspace_strided(c, threads)) a->m.k_copy = a->m.v_copy = NULL;
    return DSA_OK;
}

static int32_t valid(const int32_t *given, int32_t b, int32_t rows) {
    return given ? largest(0, least(given[b], rows)) : rows;
}
static int32_t q_valid(const call *a, int32_t b) { return valid(a->len.q, b, a->c->q_rows); }
static int32_t k_valid(const call *a, int32_t b) { return valid(a->len.kv, b, a->c->k_rows); }
static const float *head_of(dsa_tensor t, int32_t b, int32_t h) { return t.data + b * t.batch + h * t.head; }

/* Key blocks a query block may look at; rows is how many valid rows it has. */
static int32_t candidates(const call *a, int32_t b, int32_t i, int32_t rows) {
    const dsa_config *c = a->c;
    int32_t n = blocks(k_valid(a, b), c->block_k), last = c->q_offset + i * c->block_q + rows - 1;
    if (rows <= 0) return 0;
    return c->causal ? least(n, last / c->block_k + 1) : n;
}

/* ---- Select. */

/* The means of the valid key blocks of one (batch, kv head), which go where all calls find them. */
static dsa_pool keys_of(const call *a, int32_t b, int32_t g) {
    const dsa_config *c = a->c;
    float *mean = a->m.k_mean + (size_t)(b * c->kv_heads + g) * (size_t)k_blocks(c) * (size_t)c->dim;
    return (dsa_pool){head_of(a->k, b, g), a->k.row, k_valid(a, b), c->block_k, mean};
}

static void pool_keys(void *arg, int32_t i, int32_t thread) {
    const call *a = arg;
    dsa_pool keys = keys_of(a, i / a->c->kv_heads, i % a->c->kv_heads);
    (void)thread;
    a->set->means(keys, (dsa_pool){0}, a->c->dim);
}

/* e^x for x <= 0, 0 below 2^-126. Portable arithmetic only: the same bits on every CPU. */
static float exp_of(float x) {
    union {
        float f;
        int32_t i;
    } t, two_n;
    const float round = 12582912.0f;
    x *= LOG2_E;
    if (!(x >= -126.0f)) return 0;
    t.f = x + round;
    float f = x - (t.f - round);
    two_n.i = (int32_t)((uint32_t)(t.i + 127) << 23); /* round's own bits are shifted out */
    float p = 9.671512991e-3f + 1.326472731e-3f * f;
    p = 5.550733581e-2f + p * f;
    p = 2.402224243e-1f + p * f;
    p = 6.931470037e-1f + p * f;
    return (1.0f + p * f) * two_n.f;
}

/* mass[n] += softmax(z[n]); a row of -inf has no mass. NaN counts as -inf: it fails every comparison on the way. */
static void add_mass(float *z, int32_t n, float *mass) {
    float top = NONE, total = 0;
    for (int32_t j = 0; j < n; j++) {
        if (z[j] > MOST) z[j] = MOST;
        if (z[j] > top) top = z[j];
    }
    if (top == NONE) return;
    for (int32_t j = 0; j < n; j++) z[j] = exp_of(z[j] - top);
    for (int32_t j = 0; j < n; j++) total += z[j];
    for (int32_t j = 0; j < n; j++) mass[j] += z[j] / total;
}

/* z[n] += what the distance from key block `at`, and being one of the first, are worth. */
static void add_biases(const dsa_config *c, const dsa_scorer *s, int32_t h, int32_t at, int32_t n, float *z) {
    const float *dist = s->dist_bias + (size_t)h * (size_t)(2 * c->dist + 1);
    for (int32_t j = 0; j < n; j++) z[j] += dist[largest(-c->dist, least(j - at, c->dist)) + c->dist];
    for (int32_t j = 0; j < least(n, c->sinks); j++) z[j] += s->sink_bias[(size_t)h * (size_t)c->sinks + (size_t)j];
}

/* One row to decide: n candidates, blocks below sinks and from near to far are forced. */
typedef struct {
    int32_t n, sinks, near, far;
    const float *mass;
} row;

static int forced(const row *r, int32_t j) { return j < r->sinks || (j >= r->near && j < r->far); }

/* The order of keeping: forced first, then by mass, then from the left. */
static int before(const row *r, int32_t a, int32_t b) {
    int fa = forced(r, a), fb = forced(r, b);
    if (fa != fb) return fa;
    if (r->mass[a] != r->mass[b]) return r->mass[a] > r->mass[b];
    return a < b;
}

static void sift(const row *r, int32_t *heap, int32_t n, int32_t at) {
    for (int32_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && before(r, heap[child + 1], heap[child])) child++;
        if (!before(r, heap[child], heap[at])) return;
        int32_t t = heap[at];
        heap[at] = heap[child];
        heap[child] = t;
    }
}

/* Takes the next block in order out of a heap of n and leaves it behind the heap's end. */
static int32_t pop(const row *r, int32_t *heap, int32_t n) {
    int32_t first = heap[0];
    heap[0] = heap[n - 1];
    heap[n - 1] = first;
    sift(r, heap, n - 1, 0);
    return first;
}

static int32_t all(int32_t n, int32_t *idx) {
    for (int32_t j = 0; j < n; j++) idx[j] = j;
    return n;
}

/* Blocks at or above theta, and the forced ones: needs no order unless a clamp cuts or adds. */
static int32_t threshold(const row *r, float theta, int32_t most, int32_t *idx) {
    int32_t kept = 0;
    for (int32_t j = 0; j < r->n; j++)
        if (forced(r, j) || r->mass[j] >= theta) {
            if (kept < most) idx[kept] = j;
            kept++;
        }
    return kept;
}

/* Keeps blocks in order until `want` of them and, under top_p, the mass theta are reached; writes them ascending. */
static int32_t in_order(const row *r, float theta, int top_p, int32_t want, int32_t most, int32_t *heap, int32_t *idx) {
    int32_t taken = 0, last = -1, kept = 0;
    float reached = 0;
    for (int32_t j = 0; j < r->n; j++) heap[j] = j;
    for (int32_t j = r->n / 2; j-- > 0;) sift(r, heap, r->n, j);
    for (; taken < most; taken++) {
        int more = forced(r, heap[0]) || taken < want || (top_p && (theta >= 1 || reached < theta));
        if (!more) break;
        last = pop(r, heap, r->n - taken);
        reached += r->mass[last];
    }
    for (int32_t j = 0; j < r->n && last >= 0; j++)
        if (j == last || before(r, j, last)) idx[kept++] = j;
    return kept;
}

/* The rule and its clamps for one row; returns how many blocks idx got. */
static int32_t choose(const dsa_config *c, const row *r, float theta, int32_t *heap, int32_t *idx) {
    int32_t n = r->n, most = least(dsa_kmax(c), n), want = least(c->min_blocks, n);
    int top_p = c->rule == DSA_TOP_P;
    if (c->k_rows <= c->dense_below || (top_p && theta >= 1)) want = n;
    if (c->rule == DSA_TOP_K) want = largest(want, theta >= (float)n ? n : theta > 0 ? (int32_t)theta : 0);
    if (want == n && most == n) return all(n, idx);
    if (c->rule == DSA_THRESHOLD) {
        int32_t kept = threshold(r, theta, most, idx);
        if (kept >= want && kept <= most) return kept;
        want = largest(want, kept);
    }
    return in_order(r, theta, top_p, want, most, heap, idx);
}

/* What force_diag and n_sink force for query block i. */
static row row_of(const dsa_config *c, int32_t i, int32_t rows, int32_t n, const float *mass) {
    int32_t first = c->q_offset + i * c->block_q, last = first + rows - 1;
    row r = {n, c->n_sink, 0, 0, mass};
    if (c->force_diag) {
        r.near = first / c->block_k;
        r.far = last / c->block_k + 1;
    }
    return r;
}

/* The means of one query head's blocks, and with them those of its key blocks if nobody has them yet; both projected. */
static void project(const call *a, const select_scratch *s, int32_t b, int32_t h, int32_t x, int with_keys) {
    const dsa_config *c = a->c;
    size_t stride = row_of_z(c), dim = (size_t)c->dim, rank = (size_t)c->rank;
    dsa_pool q = {head_of(a->q, b, h), a->q.row, q_valid(a, b), c->block_q, s->mean};
    dsa_pool k = keys_of(a, b, h / (c->q_heads / c->kv_heads));
    a->set->means(q, with_keys ? k : (dsa_pool){0}, c->dim);
    dsa_product p = {.rows = blocks(q.rows, c->block_q), .depth = c->dim, .columns = c->rank, .w_row = c->rank};
    p.a = q.mean, p.w = a->scorer->wq + (size_t)h * dim * rank;
    p.out = s->zq + (size_t)x * rank * (size_t)q_blocks(c), p.out_row = c->rank, p.out_column = 1;
    a->set->product(&p);
    p.rows = blocks(k.rows, c->block_k), p.a = k.mean, p.w = a->scorer->wk + (size_t)h * dim * rank;
    p.out = s->zk + (size_t)x * rank * stride, p.out_row = 1, p.out_column = (ptrdiff_t)stride;
    a->set->product(&p);
    for (size_t r = 0; r < rank; r++) /* what lies beyond is scored too, and never looked at */
        for (size_t j = (size_t)p.rows; j < stride; j++) p.out[r * stride + j] = 0;
}

/* Some query blocks of a batch row: their scores in head h, the x-th of its list, without biases. */
typedef struct {
    int32_t b, first, live; /* live: have valid rows */
} panel;

static void score(const call *a, const select_scratch *s, const panel *p, int32_t x) {
    const dsa_config *c = a->c;
    size_t rank = (size_t)c->rank, n = row_of_z(c);
    const float *zq = s->zq + ((size_t)x * (size_t)q_blocks(c) + (size_t)p->first) * rank;
    dsa_product all = {p->live, c->rank, (int32_t)n, zq, s->zk + (size_t)x * rank * n, (ptrdiff_t)n, s->z, (ptrdiff_t)n, 1};
    a->set->product(&all);
}

/* How many rows of query block i are valid. */
static int32_t rows_of(const call *a, int32_t b, int32_t i) {
    return least(a->c->block_q, q_valid(a, b) - i * a->c->block_q);
}

/* mass: each query block's probability over key blocks, averaged over the heads that share the list. */
static void mass_of(const call *a, const select_scratch *s, const panel *p, int32_t list) {
    const dsa_config *c = a->c;
    int32_t shared = c->q_heads / list_heads(c);
    size_t stride = row_of_z(c), all = (size_t)p->live * stride;
    for (size_t j = 0; j < all; j++) s->mass[j] = 0;
    for (int32_t x = 0; x < shared; x++) {
        score(a, s, p, x);
        for (int32_t y = 0; y < p->live; y++) {
            int32_t i = p->first + y, n = candidates(a, p->b, i, rows_of(a, p->b, i));
            float *z = s->z + (size_t)y * stride;
            add_biases(c, a->scorer, list * shared + x, (c->q_offset + i * c->block_q) / c->block_k, n, z);
            add_mass(z, n, s->mass + (size_t)y * stride);
        }
    }
    for (size_t j = 0; j < all && shared > 1; j++) s->mass[j] /= (float)shared;
}

/* Every candidate is kept whatever the mass: nothing to score. */
static int is_dense(const dsa_config *c) { return c->k_rows <= c->dense_below && dsa_kmax(c) == k_blocks(c); }

static void select_panel(const call *a, const select_scratch *s, int32_t b, int32_t list, int32_t first) {
    const dsa_config *c = a->c;
    int32_t kmax = dsa_kmax(c), count = least(PANEL, q_blocks(c) - first);
    int32_t live = largest(0, least(count, blocks(q_valid(a, b), c->block_q) - first));
    size_t at = (size_t)(b * list_heads(c) + list) * (size_t)q_blocks(c) + (size_t)first;
    panel p = {b, first, live};
    if (live && !is_dense(c)) mass_of(a, s, &p, list);
    for (int32_t y = 0; y < count; y++, at++) {
        int32_t rows = rows_of(a, b, first + y), n = candidates(a, b, first + y, rows);
        int32_t *idx = a->idx + at * (size_t)kmax;
        row r = row_of(c, first + y, rows, n, s->mass + (size_t)y * row_of_z(c));
        int32_t kept = n > 0 ? choose(c, &r, a->scorer->theta[list], s->heap, idx) : 0;
        a->cnt[at] = kept;
        for (int32_t j = kept; j < kmax; j++) idx[j] = -1;
    }
}

static void select_some(const call *a, int32_t at, int32_t thread, int with_keys) {
    const dsa_config *c = a->c;
    int32_t b = at / list_heads(c), list = at % list_heads(c), shared = c->q_heads / list_heads(c);
    arena place = {a->m.thread + (size_t)thread * a->m.thread_bytes, 0};
    select_scratch s = select_layout(&place, c);
    for (int32_t x = 0; x < shared && !is_dense(c); x++) project(a, &s, b, list * shared + x, x, with_keys && !x);
    for (int32_t i = 0; i < q_blocks(c); i += PANEL) select_panel(a, &s, b, list, i);
}

/* One list, its keys pooled. */
static void select_list(void *arg, int32_t at, int32_t thread) { select_some(arg, at, thread, 0); }

/* All lists of one (batch, kv head). */
static void select_head(void *arg, int32_t i, int32_t thread) {
    const call *a = arg;
    int32_t lists = list_heads(a->c) / a->c->kv_heads;
    for (int32_t x = 0; x < lists; x++) select_some(a, i * lists + x, thread, x == 0);
}

static void select_all(const call *a, const dsa_parallel *p) {
    const dsa_config *c = a->c;
    if (kv_pairs(c) >= threads_of(p)) {
        run(p, kv_pairs(c), select_head, a);
        return;
    }
    if (!is_dense(c)) run(p, kv_pairs(c), pool_keys, a);
    run(p, c->batch * list_heads(c), select_list, a);
}

/* ---- Attend. */

/* shift[dim] = the mean of all valid keys, from those of the blocks: selection has read K for them already. */
static void mean_of_means(const call *a, int32_t kv, float *shift) {
    const dsa_config *c = a->c;
    int32_t rows = k_valid(a, kv / c->kv_heads);
    const float *mean = a->m.k_mean + (size_t)kv * (size_t)k_blocks(c) * (size_t)c->dim;
    for (int32_t d = 0; d < c->dim; d++) shift[d] = 0;
    for (int32_t j = 0; j * c->block_k < rows; j++) {
        float weight = (float)least(c->block_k, rows - j * c->block_k) / (float)rows;
        for (int32_t d = 0; d < c->dim; d++) shift[d] += mean[j * c->dim + d] * weight;
    }
}

/* Where this thread finds a head packed; or packs it. */
static packed packed_of(const call *a, int32_t kv, int32_t thread) {
    int32_t place = a->m.places == kv_pairs(a->c) ? kv : kv < a->whole ? thread : a->m.shared + kv - a->whole;
    arena at = {a->m.packed + (size_t)place * a->m.packed_bytes, 0};
    return packed_layout(&at, a->c);
}

/* i8: the mean of K and the scale of V per channel, over the valid tokens of one (batch, kv head). */
static void measure_kv(void *arg, int32_t i, int32_t thread) {
    const call *a = arg;
    const dsa_config *c = a->c;
    int32_t b = i / c->kv_heads, g = i % c->kv_heads;
    packed p = packed_of(a, i, thread);
    if (!a->pooled) pool_keys(arg, i, thread);
    mean_of_means(a, i, p.k_shift);
    a->set->peaks(head_of(a->v, b, g), a->v.row, k_valid(a, b), c->dim, p.v_scale);
    for (int32_t d = 0; d < c->dim; d++) p.v_scale[d] = (p.v_scale[d] > 1e-30f ? p.v_scale[d] : 1e-30f) / 127;
}

static void pack_block(void *arg, int32_t i, int32_t thread) {
    const call *a = arg;
    const dsa_config *c = a->c;
    int32_t n = k_blocks(c), kv = i / n, j = i % n, b = kv / c->kv_heads, g = kv % c->kv_heads;
    int32_t keys = least(c->block_k, k_valid(a, b) - j * c->block_k);
    size_t at = (size_t)j, dim = (size_t)c->dim, bytes = (size_t)c->block_k * dim;
    packed p = packed_of(a, kv, thread);
    if (keys <= 0) return;
    a->set->pack_k(head_of(a->k, b, g) + (ptrdiff_t)j * c->block_k * a->k.row, a->k.row, keys, c->dim, p.k_shift,
                   p.k8 + at * bytes, p.k_scale + at);
    a->set->pack_v(head_of(a->v, b, g) + (ptrdiff_t)j * c->block_k * a->v.row, a->v.row, keys, c->dim, p.v_scale,
                   p.v8 + at * bytes, p.v_sum + at * dim);
}

/* One query block against its list. */
typedef struct {
    int32_t b, h, g, first, rows; /* g: kv head; first: absolute position */
    const int32_t *idx;           /* NULL: the first `kept` blocks */
    int32_t kept;
    const float *q;
    float *out;
    packed kv;                             /* i8 */
    const float *next_q, *next_k, *next_v; /* i8: as many rows of the head this thread does next; NULL: none */
} query_block;

static int32_t listed(const query_block *w, int32_t x) { return w->idx ? w->idx[x] : x; }

/* Points the strip at key block j. */
static void take_block(const call *a, const query_block *w, dsa_strip *t, int32_t j) {
    const dsa_config *c = a->c;
    size_t dim = (size_t)c->dim, at = (size_t)j;
    t->k = head_of(a->k, w->b, w->g) + (ptrdiff_t)j * c->block_k * a->k.row;
    t->v = head_of(a->v, w->b, w->g) + (ptrdiff_t)j * c->block_k * a->v.row;
    if (c->compute != DSA_I8) return;
    t->k8 = w->kv.k8 + at * (size_t)c->block_k * dim;
    t->v8 = w->kv.v8 + at * (size_t)c->block_k * dim;
    t->v_sum = w->kv.v_sum + at * dim;
    t->k_scale = w->kv.k_scale[at];
}

/* Adds what each key's distance from each query is worth; in log2, as the logits are. Out of line, so that calls without
 * a position bias execute what they did before there was one. */
static __attribute__((noinline)) void shift_by_position(const call *a, const dsa_strip *t, int32_t h, int32_t first_key,
                                                        int32_t first_query) {
    const int32_t far = a->c->positions, last_key = first_key + t->keys - 1;
    const float *bias = a->c->position_bias + (size_t)h * (2 * (size_t)far + 1) + far;
    float by[MAX_BLOCK + MAX_STRIP];
    for (int32_t x = 0; x < t->keys + t->lanes - 1; x++)
        by[x] = LOG2_E * bias[largest(-far, least(far, last_key - first_query - x))];
    a->set->shift(t, by);
}

/* Logits and probabilities of one strip; t->keys becomes 0 if all of the block lies in the future. */
static void weigh(const call *a, dsa_strip *t, int32_t h, int32_t keys, int32_t first_key, int32_t first_query) {
    const dsa_config *c = a->c;
    int i8 = c->compute == DSA_I8;
    int32_t seen = c->causal ? least(keys, first_query + t->rows - first_key) : keys;
    t->keys = seen <= 0 ? 0 : i8 ? keys : seen; /* i8: v_sum is of the whole block */
    t->past = c->causal ? least(first_query - first_key + 1, NO_FUTURE) : NO_FUTURE;
    if (!t->keys) return;
    (i8 ? a->set->qk8 : a->set->qk)(t);
    if (c->position_bias) shift_by_position(a, t, h, first_key, first_query);
    if (t->past < t->keys) a->set->hide(t);
    (i8 ? a->set->softmax8 : a->set->softmax)(t);
}

/* The strip that starts at row `from` of a query block; its state lives in the scratch. */
static dsa_strip strip_at(const call *a, const attend_scratch *s, int32_t from, int32_t rows) {
    int32_t width = a->set->width, dim = a->c->dim;
    dsa_strip t = {0};
    t.rows = least(rows - from, a->set->strip);
    t.lanes = (t.rows + width - 1) / width * width;
    t.dim = dim;
    t.k_row = a->k.row;
    t.v_row = a->v.row;
    t.q = s->q + (ptrdiff_t)from * dim;
    t.q8 = (int32_t *)(void *)t.q; /* i8 needs a quarter of it */
    t.o = s->o + (ptrdiff_t)from * dim;
    t.s = s->s + (ptrdiff_t)from * a->c->block_k;
    t.p8 = s->p8 + (ptrdiff_t)from * a->c->block_k / 4;
    t.high = s->high;
    t.alpha = s->alpha + from;
    t.beta = s->beta + from;
    t.top = s->top + from;
    t.sum = s->sum + from;
    t.q_scale = s->q_scale + from;
    t.q_sum = s->q_sum + from;
    return t;
}

static void start(const call *a, const dsa_strip *t, const float *q) {
    (a->c->compute == DSA_I8 ? a->set->load8 : a->set->load)(t, q, a->q.row, a->scale);
    for (int32_t r = 0; r < t->lanes; r++) t->top[r] = -1e30f, t->sum[r] = 0;
    for (int32_t x = 0; x < t->rows * t->dim; x++) t->o[x] = 0;
}

static void zero_rows(float *out, ptrdiff_t row, int32_t from, int32_t to, int32_t dim) {
    for (int32_t r = from; r < to; r++)
        for (int32_t d = 0; d < dim; d++) out[r * row + d] = 0;
}

/* What the strip's loops ask for while the x-th block is attended: K and V by the first query block of a head (if they
 * are selected, K is near already), the place of the output, the next queries, which often are those of the next head. */
static void look_ahead(const call *a, const query_block *w, int32_t y, int32_t x, dsa_strip *t) {
    const dsa_config *c = a->c;
    int first = w->first == c->q_offset, last = x + 1 == w->kept;
    ptrdiff_t from = y * a->set->strip, out_row = a->out_strides[2];
    const float *k = head_of(a->k, w->b, w->g);
    dsa_rows out = {w->out + from * out_row, out_row, 0, 0}, none = {0};
    t->by_qk = y ? none : first ? (dsa_rows){t->v, a->v.row, 0, 0} : x ? none : out;
    if (last)
        t->by_pv = (dsa_rows){w->q + (c->block_q + from) * a->q.row, a->q.row, 0, 0};
    else if (first && !a->pooled)
        t->by_pv = (dsa_rows){k + ((ptrdiff_t)listed(w, x + 1) * c->block_k + from) * a->k.row, a->k.row, 0, 0};
    else
        t->by_pv = first && !x ? out : none;
}

/* int8: K and V are near in another form; those of the next head are read while there is time. Tiles are done before
 * many lines have come, so each asks for a quarter of its rows. */
static void look_ahead8(const call *a, const query_block *w, int32_t y, int32_t x, dsa_strip *t) {
    ptrdiff_t from = y * a->set->strip, out_row = a->out_strides[2];
    const float *q = a->pooled ? w->next_q : w->q + a->c->block_q * a->q.row;
    dsa_rows none = {0};
    t->by_qk = t->by_pv = none;
    if (x >= 8) return;
    if (!y) t->by_qk = x < 4 ? (dsa_rows){w->out, out_row, 3, x & 3} : (dsa_rows){w->next_v, a->v.row, 3, x & 3};
    t->by_pv = x < 4 ? (dsa_rows){q, a->q.row, 3, x & 3} : (dsa_rows){w->next_k, a->k.row, 3, x & 3};
    if (t->by_pv.x) t->by_pv.x += from * t->by_pv.row;
}

static void attend_rows(const call *a, const attend_scratch *s, const query_block *w) {
    const dsa_config *c = a->c;
    int32_t strip = a->set->strip, n = 0, i8 = c->compute == DSA_I8;
    void (*pv)(const dsa_strip *) = i8 ? a->set->pv8 : a->set->pv;
    void (*ahead)(const call *, const query_block *, int32_t, int32_t, dsa_strip *) = i8 ? look_ahead8 : look_ahead;
    dsa_strip strips[MAX_STRIPS];
    for (int32_t from = 0; from < w->rows; from += strip) {
        strips[n] = strip_at(a, s, from, w->rows);
        start(a, &strips[n++], w->q + from * a->q.row);
    }
    for (int32_t x = 0; x < w->kept; x++) {
        int32_t j = listed(w, x), at = j * c->block_k, keys = least(c->block_k, k_valid(a, w->b) - at);
        for (int32_t y = 0; y < n; y++) {
            take_block(a, w, &strips[y], j);
            ahead(a, w, y, x, &strips[y]);
            weigh(a, &strips[y], w->h, keys, at, w->first + y * strip);
        }
        /* All strips again, so that K and then V stay in the first-level cache (32 KB hold one of them, not both). */
        for (int32_t y = 0; y < n; y++)
            if (strips[y].keys) pv(&strips[y]);
    }
    for (int32_t y = 0; y < n; y++)
        a->set->store(&strips[y], i8 ? w->kv.v_scale : NULL, w->out + y * strip * a->out_strides[2], a->out_strides[2]);
}

/* i8: what belongs to query block i. */
static void find_packed(const call *a, query_block *w, int32_t i, int32_t thread) {
    const dsa_config *c = a->c;
    int32_t kv = w->b * c->kv_heads + w->g, next = kv + largest(a->m.shared, 1), b = next / c->kv_heads;
    int32_t g = next % c->kv_heads, group = c->q_heads / c->kv_heads;
    w->kv = packed_of(a, kv, thread);
    if (next >= a->whole || i >= k_blocks(c)) return;
    w->next_q = head_of(a->q, b, g * group + w->h % group) + (ptrdiff_t)i * c->block_q * a->q.row;
    w->next_k = head_of(a->k, b, g) + (ptrdiff_t)i * c->block_k * a->k.row;
    w->next_v = head_of(a->v, b, g) + (ptrdiff_t)i * c->block_k * a->v.row;
}

static void attend_block(void *arg, int32_t at, int32_t thread) {
    const call *a = arg;
    const dsa_config *c = a->c;
    int32_t nq = q_blocks(c), i = at % nq, h = at / nq % c->q_heads, b = at / nq / c->q_heads, from = i * c->block_q;
    int32_t full = least(c->block_q, c->q_rows - from), rows = largest(0, rows_of(a, b, i));
    size_t list = (size_t)(b * list_heads(c) + h / (c->q_heads / list_heads(c))) * (size_t)nq + (size_t)i;
    query_block w = {.b = b, .h = h, .g = h / (c->q_heads / c->kv_heads), .first = c->q_offset + from, .rows = rows};
    if (c->compute == DSA_I8) find_packed(a, &w, i, thread);
    w.idx = a->kept_idx ? a->kept_idx + list * (size_t)dsa_kmax(c) : NULL;
    w.kept = w.idx ? a->kept_cnt[list] : candidates(a, b, i, rows);
    w.q = head_of(a->q, b, h) + from * a->q.row;
    w.out = a->out + b * a->out_strides[0] + h * a->out_strides[1] + from * a->out_strides[2];
    arena place = {a->m.thread + (size_t)thread * a->m.thread_bytes, 0};
    attend_scratch s = attend_layout(&place, c);
    attend_rows(a, &s, &w);
    zero_rows(w.out, a->out_strides[2], rows, full, c->dim);
}

static void copy_rows(const float *from, ptrdiff_t row, int32_t rows, int32_t dim, float *to) {
    for (int32_t r = 0; r < rows; r++)
        for (int32_t d = 0; d < dim; d++) to[r * dim + d] = from[r * row + d];
}

static void copy_block(void *arg, int32_t i, int32_t thread) {
    const call *a = arg;
    const dsa_config *c = a->c;
    int32_t n = k_blocks(c), kv = i / n, b = kv / c->kv_heads, g = kv % c->kv_heads, from = i % n * c->block_k;
    int32_t rows = least(c->block_k, k_valid(a, b) - from);
    size_t to = (size_t)i * (size_t)c->block_k * (size_t)c->dim;
    (void)thread;
    copy_rows(head_of(a->k, b, g) + from * a->k.row, a->k.row, rows, c->dim, a->m.k_copy + to);
    copy_rows(head_of(a->v, b, g) + from * a->v.row, a->v.row, rows, c->dim, a->m.v_copy + to);
}

/* Rows far apart cost pages and cache sets on every visit; a block is visited by many query blocks. */
static call with_near_rows(const call *a, const dsa_parallel *p) {
    const dsa_config *c = a->c;
    call near = *a;
    if (!a->m.k_copy || q_blocks(c) == 1 || (a->k.row == c->dim && a->v.row == c->dim)) return near;
    run(p, c->batch * c->kv_heads * k_blocks(c), copy_block, a);
    ptrdiff_t head = (ptrdiff_t)k_blocks(c) * c->block_k * c->dim;
    near.k = (dsa_tensor){a->m.k_copy, c->kv_heads * head, head, c->dim};
    near.v = (dsa_tensor){a->m.v_copy, c->kv_heads * head, head, c->dim};
    return near;
}

/* ---- Order of tasks: a head from start to end where that is possible, while its rows are in the cache. */

/* Everything that comes before attending, for one (batch, kv head). */
static void prepare_head(const call *a, int32_t i, int32_t thread) {
    int32_t n = k_blocks(a->c);
    void *arg = (void *)(uintptr_t)a;
    if (a->idx) select_head(arg, i, thread);
    if (a->c->compute != DSA_I8) return;
    measure_kv(arg, i, thread);
    for (int32_t j = 0; j < n; j++) pack_block(arg, i * n + j, thread);
}

static void prepare_last(void *arg, int32_t i, int32_t thread) {
    const call *a = arg;
    prepare_head(a, a->whole + i, thread);
}

/* The first tasks are whole heads, those after them single query blocks of the heads that are prepared. */
static void attend_some(void *arg, int32_t i, int32_t thread) {
    const call *a = arg;
    int32_t each = a->c->q_heads / a->c->kv_heads * q_blocks(a->c);
    if (i >= a->whole) {
        attend_block(arg, a->whole * each + i - a->whole, thread);
        return;
    }
    prepare_head(a, i, thread);
    for (int32_t x = 0; x < each; x++) attend_block(arg, i * each + x, thread);
}

/* With several threads the last heads go block by block, so that all threads end together. */
static void attend_all(const call *given, const dsa_parallel *p) {
    call a = with_near_rows(given, p);
    const dsa_config *c = a.c;
    int32_t heads = kv_pairs(c), threads = threads_of(p), last = threads > 1 ? least(heads, threads) : 0;
    int32_t blocks_of_last = last * (c->q_heads / c->kv_heads) * q_blocks(c);
    a.whole = heads - last;
    if (heads >= threads) {
        if (a.idx || c->compute == DSA_I8) run(p, last, prepare_last, &a);
    } else {
        if (a.idx) select_all(&a, p);
        if (c->compute == DSA_I8) run(p, heads, measure_kv, &a);
        if (c->compute == DSA_I8) run(p, heads * k_blocks(c), pack_block, &a);
    }
    run(p, a.whole + blocks_of_last, attend_some, &a);
}

/* ---- The three entry points. */

/* Lists are trusted; a debug build looks at them all the same. */
static int lists_ok(const call *a) {
#ifdef DSA_CHECK_LISTS
    const dsa_config *c = a->c;
    int32_t kmax = dsa_kmax(c), n = c->batch * list_heads(c) * q_blocks(c);
    for (int32_t x = 0; a->kept_idx && x < n; x++) {
        const int32_t *idx = a->kept_idx + (size_t)x * (size_t)kmax, kept = a->kept_cnt[x];
        if (kept < 0 || kept > kmax) return 0;
        for (int32_t i = 0; i < kept; i++)
            if (idx[i] < (i ? idx[i - 1] + 1 : 0) || idx[i] >= k_blocks(c)) return 0;
    }
#endif
    (void)a;
    return 1;
}

dsa_status dsa_select(const dsa_config *c, dsa_tensor q, dsa_tensor k, const dsa_scorer *s, dsa_lengths len,
                      void *work, size_t bytes, const dsa_parallel *p, int32_t *idx, int32_t *cnt) {
    call a = {.q = q, .k = k, .scorer = s, .len = len, .idx = idx, .cnt = cnt};
    dsa_status status = begin(&a, c, work, bytes, p);
    if (status == DSA_OK) select_all(&a, p);
    return status;
}

dsa_status dsa_attend(const dsa_config *c, dsa_tensor q, dsa_tensor k, dsa_tensor v, const int32_t *idx,
                      const int32_t *cnt, dsa_lengths len, void *work, size_t bytes, const dsa_parallel *p, float *out,
                      const ptrdiff_t out_strides[3]) {
    call a = {.q = q, .k = k, .v = v, .len = len, .out = out, .out_strides = out_strides};
    a.kept_idx = idx;
    a.kept_cnt = cnt;
    dsa_status status = begin(&a, c, work, bytes, p);
    if (status == DSA_OK && !lists_ok(&a)) status = DSA_BAD_CONFIG;
    if (status == DSA_OK) attend_all(&a, p);
    return status;
}

static void count(const call *a, int64_t *kept) {
    const dsa_config *c = a->c;
    int32_t nq = q_blocks(c), lists = list_heads(c);
    kept[0] = kept[1] = 0;
    for (int32_t x = 0; x < c->batch * lists * nq; x++) {
        int32_t b = x / nq / lists, i = x % nq;
        kept[0] += a->cnt[x];
        kept[1] += candidates(a, b, i, rows_of(a, b, i));
    }
}

dsa_status dsa_fused(const dsa_config *c, dsa_tensor q, dsa_tensor k, dsa_tensor v, const dsa_scorer *s,
                     dsa_lengths len, void *work, size_t bytes, const dsa_parallel *p, float *out,
                     const ptrdiff_t out_strides[3], int64_t *kept) {
    call a = {.q = q, .k = k, .v = v, .scorer = s, .len = len, .out = out, .out_strides = out_strides};
    dsa_status status = begin(&a, c, work, bytes, p);
    if (status != DSA_OK) return status;
    a.kept_idx = a.idx = a.m.idx;
    a.kept_cnt = a.cnt = a.m.cnt;
    a.pooled = !is_dense(c);
    attend_all(&a, p);
    if (kept) count(&a, kept);
    return DSA_OK;
}
