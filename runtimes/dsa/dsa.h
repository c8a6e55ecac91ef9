/* edgeformer block-DSA: attention over the key blocks a small scorer keeps, which depend on the input.
 * The only header a binding includes. The core allocates nothing, starts no thread and keeps only dsa_limit's choice.
 * attend is exact over what select kept; fused = attend(select), bit for bit; 1 and n threads give the same bits. */
#ifndef DSA_H
#define DSA_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

enum { DSA_THRESHOLD, DSA_TOP_P, DSA_TOP_K };
enum { DSA_F32, DSA_I8, DSA_BF16 };
typedef enum { DSA_OK, DSA_BAD_CONFIG, DSA_SMALL_WORKSPACE, DSA_UNSUPPORTED } dsa_status;

/* nQ = ceil(q_rows / block_q), nK = ceil(k_rows / block_k), Hs = select_per_kv ? kv_heads : q_heads. */
typedef struct {
    int32_t batch, q_heads, kv_heads, q_rows, k_rows, dim; /* q_heads % kv_heads == 0, dim % 16 == 0 up to 256 */
    int32_t block_q, block_k;                              /* 16..128, multiples of 16 */
    int32_t rank, dist, sinks;                             /* of the scorer: r, R and S */
    int32_t rule, min_blocks, max_blocks;                  /* DSA_THRESHOLD..; max_blocks 0: no clamp */
    int32_t force_diag, n_sink;                            /* blocks that are always kept */
    int32_t causal, q_offset;                              /* q_offset: absolute position of query row 0 */
    int32_t select_per_kv, dense_below, compute;           /* compute: DSA_F32 or DSA_I8; selection is always f32 */
    float scale;                                           /* of the logits; 0: 1/sqrt(dim) */
    /* Added to the logits by key position - query position, clamped to +-positions: [q_heads][2 * positions + 1].
     * NULL: none. Selection does not see it. */
    int32_t positions;
    const float *position_bias;
} dsa_config;

/* [batch][head][row][dim]: strides in elements, the last axis is contiguous. */
typedef struct {
    const float *data;
    ptrdiff_t batch, head, row;
} dsa_tensor;

/* wq, wk [q_heads][dim][rank], dist_bias [q_heads][2*dist+1], sink_bias [q_heads][sinks] (NULL if there are none),
 * theta [Hs] */
typedef struct {
    const float *wq, *wk, *dist_bias, *sink_bias, *theta;
} dsa_scorer;

/* [batch] each: rows that are valid, from the left; NULL: all. What lies beyond is never read. */
typedef struct {
    const int32_t *q, *kv;
} dsa_lengths;

/* The binding's own thread pool: run() calls task(arg, i, thread) once for every i below tasks, 0 <= thread < threads,
 * no two at a time with the same thread, and returns when all are done. A NULL pointer means serial. */
typedef struct {
    void *pool;
    int32_t threads;
    void (*run)(void *pool, int32_t tasks, void (*task)(void *arg, int32_t i, int32_t thread), void *arg);
} dsa_parallel;

/* NULL if the config is valid, else the field and the rule it breaks. */
const char *dsa_why(const dsa_config *c);

/* Kmax = min(max_blocks or nK, nK): the last axis of idx. */
int32_t dsa_kmax(const dsa_config *c);

/* Bytes of workspace the functions below need with this many threads, at any alignment; 0 if the config is invalid. */
size_t dsa_workspace(const dsa_config *c, int32_t threads);

/* The same with room for a copy of K and V. A caller whose K and V rows are not `dim` apart (BNHD) and who passes this
 * much gets them copied first: the same bits, up to 1.3x faster in f32. Never needed. */
size_t dsa_workspace_strided(const dsa_config *c, int32_t threads);

/* idx [batch][Hs][nQ][Kmax]: kept key blocks, ascending, padded with -1. cnt [batch][Hs][nQ]: how many; 0 for a query
 * block that is all padding. */
dsa_status dsa_select(const dsa_config *c, dsa_tensor q, dsa_tensor k, const dsa_scorer *s, dsa_lengths len,
                      void *work, size_t bytes, const dsa_parallel *p, int32_t *idx, int32_t *cnt);

/* Lists are trusted: ascending, unique, in range (checked with -DDSA_CHECK_LISTS). idx NULL: all blocks.
 * out is [batch][head][row][dim] with the strides given for the first three. Padded rows and rows with nothing to see
 * are 0. DSA_I8 wants finite inputs. */
dsa_status dsa_attend(const dsa_config *c, dsa_tensor q, dsa_tensor k, dsa_tensor v, const int32_t *idx,
                      const int32_t *cnt, dsa_lengths len, void *work, size_t bytes, const dsa_parallel *p, float *out,
                      const ptrdiff_t out_strides[3]);

/* kept: two counters, blocks kept and blocks that were candidates, summed over all lists; may be NULL. */
dsa_status dsa_fused(const dsa_config *c, dsa_tensor q, dsa_tensor k, dsa_tensor v, const dsa_scorer *s,
                     dsa_lengths len, void *work, size_t bytes, const dsa_parallel *p, float *out,
                     const ptrdiff_t out_strides[3], int64_t *kept);

/* The kernel set in use, e.g. "avx512_vnni". dsa_limit keeps only the named one (tests; NULL lifts it) and answers
 * 0, changing nothing, when this CPU cannot run it. */
const char *dsa_kernels(void);
int dsa_limit(const char *name);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
