/* The vector loops, written once over the names the including file defines:
 *   vec, WIDTH, VECTORS and ROWS(vectors): register tiles are VECTORS vectors wide, 2 or 1 where there are no more, and
 *   as high as ROWS says; vload, vstore, vset (broadcast),
 *   vadd, vsub, vmul, vmax (of two, NaN in the second wins), vfma(a, b, sum), vexponent (low bits << 23 as a float),
 *   lanes, lanes_at, lane (four consecutive floats, and one of them in every lane),
 *   vabs, vdiv, ivec, iload, istore, iset, iadd, imul, ixor, ipush(a, b) = a << 8 | (b & 255), to_float,
 *   as_int (the bits), ilanes, ilanes_at (four consecutive words), store_bytes (the low byte of each word),
 *   dot4(sum, a, b) and dot4_lane(sum, a, i, b) with word i of a in every lane: four products of bytes per word,
 *   K_SHIFT and P_SHIFT: what is added to the bytes of K, subtracted from those of P, because the dot product wants
 *   one unsigned operand, the first (VNNI), or two signed ones (sdot). */
#define STRIP (VECTORS * WIDTH)
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++) /* unrolled: tiles must stay in registers */
/* f(.., at, vectors) for n lanes or columns, in as many vectors at a time as there are, at most `most` (4 or 2). */
#define IN_GROUPS(n, most, f, ...)                                                                          \
    do {                                                                                                    \
        int at = 0;                                                                                         \
        for (; at + (most) * WIDTH <= (n); at += (most) * WIDTH) f(__VA_ARGS__, at, most);                  \
        for (; at + 2 * WIDTH <= (n); at += 2 * WIDTH) f(__VA_ARGS__, at, 2);                               \
        for (; at < (n); at += WIDTH) f(__VA_ARGS__, at, 1);                                                \
    } while (0)
#define IN_VECTORS(n, f, ...) IN_GROUPS(n, VECTORS, f, __VA_ARGS__)
/* f(.., first, rows) for n rows, in tiles of so many. */
#define IN_TILES(n, vectors, f, ...)                                                                        \
    do {                                                                                                    \
        int first = 0;                                                                                      \
        for (; first + ROWS(vectors) <= (n); first += ROWS(vectors)) f(__VA_ARGS__, first, ROWS(vectors));  \
        for (; first + 4 <= (n); first += 4) f(__VA_ARGS__, first, 4);                                      \
        for (; first < (n); first++) f(__VA_ARGS__, first, 1);                                              \
    } while (0)
#define MOST_ROWS 8
#include "kernel_plain.h"

/* 2^x for x <= 0; below -126 it stays at 2^-126. Maximal relative error 1.7e-7 (5 terms) and 1e-4 (3 terms), from a
 * minimax fit on [-1/2, 1/2]. The exponent is multiplied in, not added to the bits, so that NaN stays NaN. */
#define BIASED (ROUND + 127.0f)

INLINE vec exponent_and_rest(vec x, vec *rest) {
    x = vmax(vset(-126.0f), x);
    vec t = vadd(x, vset(BIASED));
    *rest = vsub(x, vsub(t, vset(BIASED)));
    return vexponent(t);
}

INLINE vec exp2_fine(vec x) {
    vec f, two_n = exponent_and_rest(x, &f), p = vset(1.326472731e-3f);
    p = vfma(p, f, vset(9.671512991e-3f));
    p = vfma(p, f, vset(5.550733581e-2f));
    p = vfma(p, f, vset(2.402224243e-1f));
    p = vfma(p, f, vset(6.931470037e-1f));
    return vmul(vfma(p, f, vset(1.0f)), two_n);
}

/* 2^x for x <= 8, rounded to an integer that lies in the low bits of the result. */
INLINE ivec exp2_byte(vec x) {
    vec f, two_n = exponent_and_rest(x, &f), p = vset(5.500892922e-2f);
    p = vfma(p, f, vset(2.422109544e-1f));
    p = vfma(p, f, vset(6.932829022e-1f));
    return as_int(vfma(vfma(p, f, vset(1.0f)), two_n, vset(ROUND)));
}

/* x * scale rounded to an integer: again in the low bits, ROUND_BITS above it. */
#define ROUND_BITS 0x4b400000
INLINE ivec quantised(vec x, vec scale) { return as_int(vfma(x, scale, vset(ROUND))); }

/* A 4 x 4 transpose in 128-bit registers, which every vector unit has; of floats or of whatever has their size. */
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

INLINE void transpose4(quad a, quad b, quad c, quad d, quad to[4]) {
    quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    quad ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    to[0] = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
    to[1] = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    to[2] = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5);
    to[3] = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
}

#define quad_at(p) (*(const quad *)(const void *)(p))

static void load_q(const dsa_strip *t, const float *q, ptrdiff_t row, float scale) {
    int r = 0;
    for (; r + 4 <= t->rows; r += 4)
        for (int d = 0; d < t->dim; d += 4) {
            const float *x = q + r * row + d;
            quad to[4];
            transpose4(quad_at(x), quad_at(x + row), quad_at(x + 2 * row), quad_at(x + 3 * row), to);
            EACH(i, 4) *(quad *)(t->q + (d + i) * STRIP + r) = to[i] * scale;
        }
    for (; r < t->lanes; r++)
        for (int d = 0; d < t->dim; d++) t->q[d * STRIP + r] = r < t->rows ? q[r * row + d] * scale : 0;
}

/* A few rows per tile: asked for all at once they would only queue up. Out of line, away from the tiles' registers. */
static __attribute__((noinline)) void ask(dsa_rows soon, int dim, int first, int rows) {
    for (int i = first; i < first + rows; i++)
        for (int d = 0; d < dim && (i & soon.mask) == soon.part; d += 16)
            __builtin_prefetch(soon.x + i * soon.row + d, 0, 2);
}

INLINE void ask_rows(dsa_rows soon, int dim, int first, int rows) {
    if (__builtin_expect(soon.x != NULL, 0)) ask(soon, dim, first, rows);
}

/* s[first + i][at + ..] for `rows` keys; high is raised while the tile is in registers. */
INLINE void qk_tile(const dsa_strip *t, int at, const int vectors, vec *high, int first, const int rows) {
    vec sum[MOST_ROWS][VECTORS];
    const float *k = t->k + first * t->k_row;
    ask_rows(t->by_qk, t->dim, first, rows);
    EACH(i, rows)
        EACH(j, vectors) sum[i][j] = vset(0.0f);
    for (int d = 0; d < t->dim; d += 4) {
        lanes a[MOST_ROWS];
        EACH(i, rows) a[i] = lanes_at(k + i * t->k_row + d);
        EACH(x, 4) {
            vec b[VECTORS];
            EACH(j, vectors) b[j] = vload(t->q + (d + x) * STRIP + at + j * WIDTH);
            EACH(i, rows)
                EACH(j, vectors) sum[i][j] = vfma(lane(a[i], x), b[j], sum[i][j]);
        }
    }
    EACH(i, rows)
        EACH(j, vectors) {
            vstore(t->s + (first + i) * STRIP + at + j * WIDTH, sum[i][j]);
            high[j] = vmax(sum[i][j], high[j]);
        }
}

/* How many keys the queries before `end` need: those one of them sees, and what their last tile of P V reads. */
INLINE int keys_before(const dsa_strip *t, int end) {
    const int needed = t->past + end + MOST_ROWS;
    return needed < 0 ? 0 : needed < t->keys ? needed : t->keys;
}

/* Where there is a future, fewer lanes at a time leave more of it out. */
#define IN_LANES(t, f, ...)                                             \
    do {                                                                \
        if ((t)->past < (t)->keys)                                      \
            IN_GROUPS((t)->lanes, 2, f, __VA_ARGS__);                   \
        else                                                            \
            IN_VECTORS((t)->lanes, f, __VA_ARGS__);                     \
    } while (0)

INLINE void qk_lanes(const dsa_strip *t, int at, const int vectors) {
    const int keys = keys_before(t, at + vectors * WIDTH);
    vec high[VECTORS];
    EACH(j, vectors) high[j] = vset(-1e30f);
    IN_TILES(keys, vectors, qk_tile, t, at, vectors, high);
    EACH(j, vectors) vstore(t->high + at + j * WIDTH, high[j]);
}

static void qk(const dsa_strip *t) { IN_LANES(t, qk_lanes, t); }

static void shift(const dsa_strip *t, const float *by) {
    for (int at = 0; at < t->lanes; at += WIDTH) {
        vec high = vset(-1e30f);
        for (int i = 0; i < t->keys; i++) {
            vec s = vadd(vload(t->s + i * STRIP + at), vload(by + t->keys - 1 - i + at));
            vstore(t->s + i * STRIP + at, s);
            high = vmax(s, high);
        }
        vstore(t->high + at, high);
    }
}

/* 16 lanes that do not see a key, then 16 that do. */
static const int32_t edge[32] = {[16 ... 31] = -1};

static void hide(const dsa_strip *t) {
    const ivec none = as_int(vset(-__builtin_inff()));
    for (int at = 0; at < t->lanes; at += WIDTH) {
        vec high = vset(-1e30f);
        for (int i = 0; i < t->keys; i++) {
            const int hidden = i - t->past - at + 1; /* of these lanes, from the first one on */
            vec s = vload(t->s + i * STRIP + at);
            if (hidden > 0) {
                ivec seen = hidden < WIDTH ? iload(edge + 16 - hidden) : iset(0);
                s = (vec)((as_int(s) & seen) | (none & ~seen));
                vstore(t->s + i * STRIP + at, s);
            }
            high = vmax(s, high);
        }
        vstore(t->high + at, high);
    }
}

static void softmax(const dsa_strip *t) {
    for (int at = 0; at < t->lanes; at += WIDTH) {
        const int keys = keys_before(t, at + WIDTH);
        vec old = vload(t->top + at), top = vmax(vload(t->high + at), old), sum = vset(0.0f);
        vec alpha = exp2_fine(vsub(old, top));
        for (int i = 0; i < keys; i++) {
            vec p = exp2_fine(vsub(vload(t->s + i * STRIP + at), top));
            vstore(t->s + i * STRIP + at, p);
            sum = vadd(sum, p);
        }
        vstore(t->top + at, top);
        vstore(t->alpha + at, alpha);
        vstore(t->sum + at, vfma(vload(t->sum + at), alpha, sum));
    }
}

INLINE void pv_tile(const dsa_strip *t, int column, const int vectors, int first, const int rows) {
    vec sum[MOST_ROWS][VECTORS];
    float *o = t->o + first * t->dim + column;
    const float *p = t->s + first, *v = t->v + column;
    const int keys = keys_before(t, first + rows - MOST_ROWS);
    ask_rows(t->by_pv, t->dim, first, rows);
    EACH(i, rows)
        EACH(j, vectors)
            sum[i][j] = vmul(vload(o + i * t->dim + j * WIDTH), vset(t->alpha[first + i]));
    for (int key = 0; key < keys; key++) {
        vec b[VECTORS];
        lanes a[(MOST_ROWS + 3) / 4];
        EACH(j, vectors) b[j] = vload(v + key * t->v_row + j * WIDTH);
        EACH(i, (rows + 3) / 4) a[i] = lanes_at(p + key * STRIP + 4 * i);
        EACH(i, rows)
            EACH(j, vectors) sum[i][j] = vfma(lane(a[i / 4], i % 4), b[j], sum[i][j]);
    }
    EACH(i, rows)
        EACH(j, vectors) vstore(o + i * t->dim + j * WIDTH, sum[i][j]);
}

INLINE void pv_columns(const dsa_strip *t, int column, const int vectors) {
    IN_TILES(t->rows, vectors, pv_tile, t, column, vectors);
}

static void pv(const dsa_strip *t) { IN_VECTORS(t->dim, pv_columns, t); }

/* Means and peaks are the first to touch K, V and, selecting, Q: they ask for rows before they need them. */
#define AHEAD 8
#define ask_for(x, j) (j * WIDTH % 16 == 0 ? __builtin_prefetch((x) + j * WIDTH, 0, 2) : (void)0)

/* The first `rows` rows of one or two. */
INLINE void first_means(const dsa_pool *p, const int pools, int rows, int column, const int vectors) {
    vec total[2][4];
    EACH(i, pools)
        EACH(j, vectors) total[i][j] = vset(0.0f);
    for (int r = 0; r < rows; r++)
        EACH(i, pools) {
            const float *x = p[i].x + r * p[i].row + column;
            EACH(j, vectors) ask_for(x + AHEAD * p[i].row, j);
            EACH(j, vectors) total[i][j] = vadd(total[i][j], vload(x + j * WIDTH));
        }
    EACH(i, pools)
        EACH(j, vectors) vstore(p[i].mean + column + j * WIDTH, vdiv(total[i][j], vset((float)rows)));
}

INLINE void next_block(dsa_pool *p, int dim) {
    p->x += p->block * p->row;
    p->rows -= p->block;
    p->mean += dim;
}

static void means_of(dsa_pool p, int dim) {
    for (; p.rows > 0; next_block(&p, dim))
        IN_GROUPS(dim, 4, first_means, &p, 1, p.rows < p.block ? p.rows : p.block);
}

static void means(dsa_pool one, dsa_pool other, int dim) {
    dsa_pool p[2] = {one, other};
    const int block = one.block;
    for (; p[0].rows >= block && p[1].rows >= block && other.block == block; next_block(p, dim), next_block(p + 1, dim))
        IN_GROUPS(dim, 4, first_means, p, 2, block);
    means_of(p[0], dim);
    means_of(p[1], dim);
}

/* most[j] = largest |x - middle| of each column; four independent chains hide the latency of max. */
INLINE void column_peaks(const float *x, ptrdiff_t row, int rows, const int vectors, const vec *middle, vec *most) {
    EACH(j, vectors) most[j] = vset(0.0f);
    for (int r = 0; r < rows; r++) {
        EACH(j, vectors) ask_for(x + (r + AHEAD) * row, j);
        EACH(j, vectors) most[j] = vmax(most[j], vabs(vsub(vload(x + r * row + j * WIDTH), middle[j])));
    }
}

INLINE void peaks_from(const float *x, ptrdiff_t row, int rows, float *peak, int column, const int vectors) {
    const vec zero[4] = {vset(0.0f), vset(0.0f), vset(0.0f), vset(0.0f)};
    vec most[4];
    column_peaks(x + column, row, rows, vectors, zero, most);
    EACH(j, vectors) vstore(peak + column + j * WIDTH, most[j]);
}

static void peaks(const float *x, ptrdiff_t row, int rows, int dim, float *peak) {
    IN_GROUPS(dim, 4, peaks_from, x, row, rows, peak);
}

/* A vector of row i of the product; `out` may be transposed. */
INLINE void put(const dsa_product *p, int i, int column, vec sum) {
    float lane[WIDTH], *out = p->out + i * p->out_row + column * p->out_column;
    if (p->out_column == 1) {
        vstore(out, sum);
        return;
    }
    vstore(lane, sum);
    EACH(x, WIDTH) out[x * p->out_column] = lane[x];
}

INLINE void product_tile(const dsa_product *p, int column, const int vectors, int first, const int rows) {
    vec sum[MOST_ROWS][VECTORS];
    const float *a = p->a + first * p->depth, *w = p->w + column;
    EACH(i, rows)
        EACH(j, vectors) sum[i][j] = vset(0.0f);
    for (int d = 0; d < p->depth; d++)
        EACH(j, vectors) {
            vec b = vload(w + d * p->w_row + j * WIDTH);
            EACH(i, rows) sum[i][j] = vadd(sum[i][j], vmul(vset(a[i * p->depth + d]), b));
        }
    EACH(i, rows)
        EACH(j, vectors) put(p, first + i, column + j * WIDTH, sum[i][j]);
}

INLINE void product_vectors(const dsa_product *p, int column, const int vectors) {
    IN_TILES(p->rows, vectors, product_tile, p, column, vectors);
}

static void product(const dsa_product *p) {
    const int whole = p->columns / WIDTH * WIDTH;
    IN_VECTORS(whole, product_vectors, p);
    product_columns(p, whole);
}

/* Of numbers that are not negative, which are ordered as their bits are. */
INLINE quad quad_max(quad a, quad b) {
    typedef int32_t words __attribute__((vector_size(16)));
    const words x = (words)a, y = (words)b, first = x > y;
    return (quad)((x & first) | (y & ~first));
}

/* int8. The largest |x| of each of four rows, of which the last may be missing. */
INLINE quad row_peaks(const float *q, ptrdiff_t row, int rows, int dim) {
    float lane[4][WIDTH];
    quad most[4];
    EACH(i, 4) {
        vec peak = vset(1e-30f);
        for (int d = 0; d < dim && i < rows; d += WIDTH) peak = vmax(peak, vabs(vload(q + i * row + d)));
        vstore(lane[i], peak);
        most[i] = quad_at(lane[i]);
        for (int x = 4; x < WIDTH; x += 4) most[i] = quad_max(most[i], quad_at(lane[i] + x));
    }
    transpose4(most[0], most[1], most[2], most[3], most);
    return quad_max(quad_max(most[0], most[1]), quad_max(most[2], most[3]));
}

INLINE void quantise_row(const float *x, int dim, float peak, int8_t *to) {
    const vec inverse = vset(127 / peak);
    for (int d = 0; d < dim; d += WIDTH) store_bytes(to + d, quantised(vload(x + d), inverse));
}

/* Four rows of bytes to columns of words. */
INLINE void transpose_words(const int8_t *x, int dim, int32_t *to) {
    for (int d = 0; d < dim; d += 16, x += 16, to += 4 * STRIP) {
        quad word[4];
        transpose4(quad_at(x), quad_at(x + dim), quad_at(x + 2 * dim), quad_at(x + 3 * dim), word);
        EACH(i, 4) *(quad *)(void *)(to + i * STRIP) = word[i];
    }
}

INLINE void q_sums(const dsa_strip *t, int at, const int vectors) {
    ivec sum[VECTORS];
    EACH(j, vectors) sum[j] = iset(0);
    for (int d = 0; d < t->dim / 4; d++)
        EACH(j, vectors) sum[j] = dot4(sum[j], iset(0x01010101), iload(t->q8 + d * STRIP + at + j * WIDTH));
    EACH(j, vectors) istore(t->q_sum + at + j * WIDTH, sum[j]);
}

/* One scale per query. Rows become bytes before they are transposed: a quarter of the work. */
static void load8(const dsa_strip *t, const float *q, ptrdiff_t row, float scale) {
    const int dim = t->dim;
    int8_t bytes[4 * 256] = {0};
    for (int r = 0; r < t->lanes; r += 4) {
        quad peak = row_peaks(q + r * row, row, t->rows - r, dim);
        *(quad *)(t->q_scale + r) = peak * (scale / 127);
        EACH(i, 4) quantise_row(q + (r + i) * row, r + i < t->rows ? dim : 0, peak[i], bytes + i * dim);
        transpose_words(bytes, dim, t->q8 + r);
    }
    IN_VECTORS(t->lanes, q_sums, t);
}

/* The largest |k - mean| of a block. */
static float spread(const float *k, ptrdiff_t row, int keys, int dim, const float *mean) {
    float peak = 1e-30f, lane[WIDTH];
    vec all = vset(peak), middle[4], most[4];
    for (int d = 0; d < dim;) {
        int vectors = d + 4 * WIDTH <= dim ? 4 : 1;
        EACH(j, vectors) middle[j] = vload(mean + d + j * WIDTH);
        if (vectors == 4)
            column_peaks(k + d, row, keys, 4, middle, most);
        else
            column_peaks(k + d, row, keys, 1, middle, most);
        EACH(j, vectors) all = vmax(all, most[j]);
        d += vectors * WIDTH;
    }
    vstore(lane, all);
    for (int i = 0; i < WIDTH; i++) peak = lane[i] > peak ? lane[i] : peak;
    return peak;
}

static void pack_k(const float *k, ptrdiff_t row, int keys, int dim, const float *mean, int8_t *k8, float *k_scale) {
    float peak = spread(k, row, keys, dim, mean);
    vec inverse = vset(127 / peak);
    *k_scale = peak / 127;
    for (int d = 0; d < dim; d += WIDTH) {
        vec middle = vload(mean + d);
        for (int r = 0; r < keys; r++) {
            vec x = vsub(vload(k + r * row + d), middle);
            store_bytes(k8 + r * dim + d, as_int(vfma(x, inverse, vset(ROUND + K_SHIFT))));
        }
    }
}

/* Four keys of one channel make a word; missing keys are 0. */
static void pack_v(const float *v, ptrdiff_t row, int keys, int dim, const float *scale, int8_t *v8, int32_t *v_sum) {
    for (int d = 0; d < dim; d += WIDTH) {
        const vec inverse = vdiv(vset(1.0f), vload(scale + d));
        ivec sum = iset((int32_t)((uint32_t)-keys * ROUND_BITS));
        for (int r = 0; r < keys; r += 4) {
            ivec packed = iset(0);
            for (int i = r + 4 <= keys ? 4 : keys - r; i-- > 0;) {
                ivec a = quantised(vload(v + (r + i) * row + d), inverse);
                sum = iadd(sum, a);
                packed = ipush(packed, a);
            }
            istore(v8 + (r * dim + 4 * d), packed);
        }
        istore(v_sum + d, sum);
    }
}

/* The same tiles as above over words of four bytes. */
INLINE void qk8_tile(const dsa_strip *t, int at, const int vectors, vec *high, int first, const int rows) {
    ivec sum[MOST_ROWS][VECTORS];
    const int8_t *k = t->k8 + first * t->dim;
    ask_rows(t->by_qk, t->dim, first, rows);
    EACH(j, vectors) {
        ivec start = K_SHIFT ? imul(iload(t->q_sum + at + j * WIDTH), iset(-K_SHIFT)) : iset(0);
        EACH(i, rows) sum[i][j] = start;
    }
    for (int d = 0; d < t->dim; d += 16) {
        ilanes a[MOST_ROWS];
        EACH(i, rows) a[i] = ilanes_at(k + i * t->dim + d);
        EACH(x, 4) {
            ivec b[VECTORS];
            EACH(j, vectors) b[j] = iload(t->q8 + (d / 4 + x) * STRIP + at + j * WIDTH);
            EACH(i, rows)
                EACH(j, vectors) sum[i][j] = dot4_lane(sum[i][j], a[i], x, b[j]);
        }
    }
    EACH(j, vectors) {
        vec scale = vmul(vload(t->q_scale + at + j * WIDTH), vset(t->k_scale));
        EACH(i, rows) {
            vec s = vmul(to_float(sum[i][j]), scale);
            vstore(t->s + (first + i) * STRIP + at + j * WIDTH, s);
            high[j] = vmax(s, high[j]);
        }
    }
}

INLINE void qk8_lanes(const dsa_strip *t, int at, const int vectors) {
    const int keys = keys_before(t, at + vectors * WIDTH);
    vec high[VECTORS];
    EACH(j, vectors) high[j] = vset(-1e30f);
    IN_TILES(keys, vectors, qk8_tile, t, at, vectors, high);
    EACH(j, vectors) vstore(t->high + at + j * WIDTH, high[j]);
}

static void qk8(const dsa_strip *t) { IN_LANES(t, qk8_lanes, t); }

/* The next `keys` (at most 4) probabilities of a vector of queries as bytes; missing ones are 0. */
INLINE ivec p_words(const float *s, const int keys, vec from) {
    ivec packed = iset(0);
    for (int x = keys; x-- > 0;) packed = ipush(packed, exp2_byte(vsub(vload(s + x * STRIP), from)));
    return P_SHIFT ? ixor(packed, iset((int32_t)0x80808080)) : packed;
}

/* P is quantised against the maximum of this block: fine even where the block matters little. beta undoes it. */
static void softmax8(const dsa_strip *t) {
    const float log2_255 = 7.99435343686f;
    const int groups = (t->keys + 3) / 4, rest = t->keys % 4;
    for (int at = 0; at < t->lanes; at += WIDTH) {
        const ivec ones = iset(0x01010101);
        vec old = vload(t->top + at), high = vload(t->high + at), top = vmax(high, old);
        vec alpha = exp2_fine(vsub(old, top)), beta = vmul(exp2_fine(vsub(high, top)), vset(1.0f / 255));
        vec from = vsub(high, vset(log2_255));
        ivec sum = iset(4 * P_SHIFT * groups), p;
        int32_t *to = t->p8 + at;
        const float *s = t->s + at;
        for (int i = 0; i < t->keys / 4; i++, s += 4 * STRIP, to += STRIP) {
            istore(to, p = p_words(s, 4, from));
            sum = dot4(sum, p, ones);
        }
        if (rest) {
            istore(to, p = rest == 1 ? p_words(s, 1, from) : rest == 2 ? p_words(s, 2, from) : p_words(s, 3, from));
            sum = dot4(sum, p, ones);
        }
        vstore(t->top + at, top);
        vstore(t->alpha + at, alpha);
        vstore(t->beta + at, beta);
        vstore(t->sum + at, vfma(vload(t->sum + at), alpha, vmul(to_float(sum), beta)));
    }
}

INLINE void pv8_tile(const dsa_strip *t, int column, const int vectors, int first, const int rows) {
    ivec sum[MOST_ROWS][VECTORS];
    ask_rows(t->by_pv, t->dim, first, rows);
    EACH(j, vectors) {
        ivec start = P_SHIFT ? imul(iload(t->v_sum + column + j * WIDTH), iset(P_SHIFT)) : iset(0);
        EACH(i, rows) sum[i][j] = start;
    }
    for (int group = 0; group < (t->keys + 3) / 4; group++) {
        ivec b[VECTORS];
        ilanes a[(MOST_ROWS + 3) / 4];
        EACH(j, vectors) b[j] = iload(t->v8 + (group * t->dim + column + j * WIDTH) * 4);
        EACH(i, (rows + 3) / 4) a[i] = ilanes_at(t->p8 + group * STRIP + first + 4 * i);
        EACH(i, rows)
            EACH(j, vectors) sum[i][j] = dot4_lane(sum[i][j], a[i / 4], i % 4, b[j]);
    }
    EACH(i, rows)
        EACH(j, vectors) {
            float *o = t->o + (first + i) * t->dim + column + j * WIDTH;
            vec fresh = vmul(to_float(sum[i][j]), vset(t->beta[first + i]));
            vstore(o, vfma(vload(o), vset(t->alpha[first + i]), fresh));
        }
}

INLINE void pv8_columns(const dsa_strip *t, int column, const int vectors) {
    IN_TILES(t->rows, vectors, pv8_tile, t, column, vectors);
}

static void pv8(const dsa_strip *t) { IN_VECTORS(t->dim, pv8_columns, t); }

#define KERNEL_SET(set)                                                                                           \
    const dsa_kernel_set dsa_kernels_##set = {#set,  WIDTH, STRIP,    load_q, qk,    softmax, pv,    store_rows,   \
                                              load8, qk8,   softmax8, pv8,    shift, hide,    means, product, peaks, \
                                              pack_k, pack_v}
