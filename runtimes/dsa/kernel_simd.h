/* The vector loops, written once over the names the including file defines:
 *   vec, WIDTH, ROWS (of a register tile; the tile is ROWS x 2 vectors), vload, vstore, vset (broadcast),
 *   vadd, vsub, vmul, vmax (of two, NaN in the second wins), vfma(a, b, sum), vexponent (low bits << 23 as a float),
 *   lanes, lanes_at, lane (four consecutive floats, and one of them in every lane),
 *   vabs, vdiv, ivec, iload, istore, iset, iadd, imul, ixor, ipush(a, b) = a << 8 | (b & 255), to_float,
 *   as_int (the bits), ilanes, ilanes_at (four consecutive words), store_bytes (the low byte of each word),
 *   dot4(sum, a, b) and dot4_lane(sum, a, i, b) with word i of a in every lane: four products of bytes per word,
 *   K_SHIFT and P_SHIFT: what is added to the bytes of K, subtracted from those of P, because the dot product wants
 *   one unsigned operand, the first (VNNI), or two signed ones (sdot). */
#define STRIP (2 * WIDTH)
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++) /* unrolled: tiles must stay in registers */
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

/* A 4 x 4 transpose in 128-bit registers, which every vector unit has. */
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

INLINE void transpose4(const float *x, ptrdiff_t row, float scale, float *to) {
    quad a = *(const quad *)x * scale, b = *(const quad *)(x + row) * scale, c = *(const quad *)(x + 2 * row) * scale,
         d = *(const quad *)(x + 3 * row) * scale;
    quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    quad ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    *(quad *)(to) = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
    *(quad *)(to + STRIP) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    *(quad *)(to + 2 * STRIP) = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5);
    *(quad *)(to + 3 * STRIP) = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
}

static void load_q(const dsa_strip *t, const float *q, ptrdiff_t row, float scale) {
    int r = 0;
    for (; r + 4 <= t->rows; r += 4)
        for (int d = 0; d < t->dim; d += 4) transpose4(q + r * row + d, row, scale, t->q + d * STRIP + r);
    for (; r < t->lanes; r++)
        for (int d = 0; d < t->dim; d++) t->q[d * STRIP + r] = r < t->rows ? q[r * row + d] * scale : 0;
}

/* s[first + i][..] for `rows` keys and one or two vectors of queries; high is raised while the tile is in registers. */
INLINE void qk_tile(const dsa_strip *t, int first, const int rows, const int vectors, vec *high) {
    vec sum[ROWS][2];
    const float *k = t->k + first * t->k_row;
    EACH(i, rows)
        EACH(j, vectors) sum[i][j] = vset(0.0f);
    for (int d = 0; d < t->dim; d += 4) {
        lanes a[ROWS];
        EACH(i, rows) a[i] = lanes_at(k + i * t->k_row + d);
        EACH(x, 4) {
            vec b[2];
            EACH(j, vectors) b[j] = vload(t->q + (d + x) * STRIP + j * WIDTH);
            EACH(i, rows)
                EACH(j, vectors) sum[i][j] = vfma(lane(a[i], x), b[j], sum[i][j]);
        }
    }
    EACH(i, rows)
        EACH(j, vectors) {
            vstore(t->s + (first + i) * STRIP + j * WIDTH, sum[i][j]);
            high[j] = vmax(sum[i][j], high[j]);
        }
}

INLINE void qk_keys(const dsa_strip *t, const int vectors) {
    vec high[2] = {vset(-1e30f), vset(-1e30f)};
    int i = 0;
    for (; i + ROWS <= t->keys; i += ROWS) qk_tile(t, i, ROWS, vectors, high);
    for (; ROWS > 4 && i + 4 <= t->keys; i += 4) qk_tile(t, i, 4, vectors, high);
    for (; i < t->keys; i++) qk_tile(t, i, 1, vectors, high);
    EACH(j, vectors) vstore(t->high + j * WIDTH, high[j]);
}

static void qk(const dsa_strip *t) {
    if (t->lanes > WIDTH)
        qk_keys(t, 2);
    else
        qk_keys(t, 1);
}

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

static void softmax(const dsa_strip *t) {
    for (int at = 0; at < t->lanes; at += WIDTH) {
        vec old = vload(t->top + at), top = vmax(vload(t->high + at), old), sum = vset(0.0f);
        vec alpha = exp2_fine(vsub(old, top));
        for (int i = 0; i < t->keys; i++) {
            vec p = exp2_fine(vsub(vload(t->s + i * STRIP + at), top));
            vstore(t->s + i * STRIP + at, p);
            sum = vadd(sum, p);
        }
        vstore(t->top + at, top);
        vstore(t->alpha + at, alpha);
        vstore(t->sum + at, vfma(vload(t->sum + at), alpha, sum));
    }
}

INLINE void pv_tile(const dsa_strip *t, int row, int column, const int rows, const int vectors) {
    vec sum[ROWS][2];
    float *o = t->o + row * t->dim + column;
    const float *p = t->s + row, *v = t->v + column;
    EACH(i, rows)
        EACH(j, vectors)
            sum[i][j] = vmul(vload(o + i * t->dim + j * WIDTH), vset(t->alpha[row + i]));
    for (int key = 0; key < t->keys; key++) {
        vec b[2];
        lanes a[(ROWS + 3) / 4];
        EACH(j, vectors) b[j] = vload(v + key * t->v_row + j * WIDTH);
        EACH(i, (rows + 3) / 4) a[i] = lanes_at(p + key * STRIP + 4 * i);
        EACH(i, rows)
            EACH(j, vectors) sum[i][j] = vfma(lane(a[i / 4], i % 4), b[j], sum[i][j]);
    }
    EACH(i, rows)
        EACH(j, vectors) vstore(o + i * t->dim + j * WIDTH, sum[i][j]);
}

INLINE void pv_rows(const dsa_strip *t, int column, const int vectors) {
    int r = 0;
    for (; r + ROWS <= t->rows; r += ROWS) pv_tile(t, r, column, ROWS, vectors);
    for (; ROWS > 4 && r + 4 <= t->rows; r += 4) pv_tile(t, r, column, 4, vectors);
    for (; r < t->rows; r++) pv_tile(t, r, column, 1, vectors);
}

static void pv(const dsa_strip *t) {
    int d = 0;
    for (; d + STRIP <= t->dim; d += STRIP) pv_rows(t, d, 2);
    for (; d < t->dim; d += WIDTH) pv_rows(t, d, 1);
}

INLINE void column_sums(const float *x, ptrdiff_t row, int rows, const int vectors, float *sum) {
    vec total[4];
    EACH(j, vectors) total[j] = vset(0.0f);
    for (int r = 0; r < rows; r++)
        EACH(j, vectors) total[j] = vadd(total[j], vload(x + r * row + j * WIDTH));
    EACH(j, vectors) vstore(sum + j * WIDTH, total[j]);
}

static void sums(const float *x, ptrdiff_t row, int rows, int dim, float *sum) {
    int d = 0;
    for (; d + 4 * WIDTH <= dim; d += 4 * WIDTH) column_sums(x + d, row, rows, 4, sum + d);
    for (; d < dim; d += WIDTH) column_sums(x + d, row, rows, 1, sum + d);
}

/* most[j] = largest |x - middle| of each column; four independent chains hide the latency of max. */
INLINE void column_peaks(const float *x, ptrdiff_t row, int rows, const int vectors, const vec *middle, vec *most) {
    EACH(j, vectors) most[j] = vset(0.0f);
    for (int r = 0; r < rows; r++)
        EACH(j, vectors)
            most[j] = vmax(most[j], vabs(vsub(vload(x + r * row + j * WIDTH), middle[j])));
}

static void peaks(const float *x, ptrdiff_t row, int rows, int dim, float *peak) {
    const vec zero[4] = {vset(0.0f), vset(0.0f), vset(0.0f), vset(0.0f)};
    vec most[4];
    int d = 0;
    for (; d + 4 * WIDTH <= dim; d += 4 * WIDTH) {
        column_peaks(x + d, row, rows, 4, zero, most);
        for (int j = 0; j < 4; j++) vstore(peak + d + j * WIDTH, most[j]);
    }
    for (; d < dim; d += WIDTH) {
        column_peaks(x + d, row, rows, 1, zero, most);
        vstore(peak + d, most[0]);
    }
}

/* int8. One scale per query; in place, since word d/4 is written after its four floats were read. */
static void load8(const dsa_strip *t, const float *q, ptrdiff_t row, float scale) {
    load_q(t, q, row, 1.0f);
    for (int at = 0; at < t->lanes; at += WIDTH) {
        vec peak = vset(1e-30f);
        ivec sum = iset((int32_t)((uint32_t)-t->dim * ROUND_BITS));
        for (int d = 0; d < t->dim; d++) peak = vmax(peak, vabs(vload(t->q + d * STRIP + at)));
        vstore(t->q_scale + at, vmul(peak, vset(scale / 127)));
        vec inverse = vdiv(vset(127.0f), peak);
        for (int d = 0; d < t->dim; d += 4) {
            ivec packed = iset(0);
            for (int x = 4; x-- > 0;) {
                ivec a = quantised(vload(t->q + (d + x) * STRIP + at), inverse);
                sum = iadd(sum, a);
                packed = ipush(packed, a);
            }
            istore(t->q8 + d / 4 * STRIP + at, packed);
        }
        istore(t->q_sum + at, sum);
    }
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
INLINE void qk8_tile(const dsa_strip *t, int first, const int rows, const int vectors, vec *high) {
    ivec sum[ROWS][2];
    const int8_t *k = t->k8 + first * t->dim;
    EACH(i, rows)
        EACH(j, vectors) sum[i][j] = K_SHIFT ? imul(iload(t->q_sum + j * WIDTH), iset(-K_SHIFT)) : iset(0);
    for (int d = 0; d < t->dim; d += 16) {
        ilanes a[ROWS];
        EACH(i, rows) a[i] = ilanes_at(k + i * t->dim + d);
        EACH(x, 4) {
            ivec b[2];
            EACH(j, vectors) b[j] = iload(t->q8 + (d / 4 + x) * STRIP + j * WIDTH);
            EACH(i, rows)
                EACH(j, vectors) sum[i][j] = dot4_lane(sum[i][j], a[i], x, b[j]);
        }
    }
    EACH(j, vectors) {
        vec scale = vmul(vload(t->q_scale + j * WIDTH), vset(t->k_scale));
        EACH(i, rows) {
            vec s = vmul(to_float(sum[i][j]), scale);
            vstore(t->s + (first + i) * STRIP + j * WIDTH, s);
            high[j] = vmax(s, high[j]);
        }
    }
}

INLINE void qk8_keys(const dsa_strip *t, const int vectors) {
    vec high[2] = {vset(-1e30f), vset(-1e30f)};
    int i = 0;
    for (; i + ROWS <= t->keys; i += ROWS) qk8_tile(t, i, ROWS, vectors, high);
    for (; ROWS > 4 && i + 4 <= t->keys; i += 4) qk8_tile(t, i, 4, vectors, high);
    for (; i < t->keys; i++) qk8_tile(t, i, 1, vectors, high);
    EACH(j, vectors) vstore(t->high + j * WIDTH, high[j]);
}

static void qk8(const dsa_strip *t) {
    if (t->lanes > WIDTH)
        qk8_keys(t, 2);
    else
        qk8_keys(t, 1);
}

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

INLINE void pv8_tile(const dsa_strip *t, int row, int column, const int rows, const int vectors) {
    ivec sum[ROWS][2];
    EACH(j, vectors) {
        ivec start = P_SHIFT ? imul(iload(t->v_sum + column + j * WIDTH), iset(P_SHIFT)) : iset(0);
        EACH(i, rows) sum[i][j] = start;
    }
    for (int group = 0; group < (t->keys + 3) / 4; group++) {
        ivec b[2];
        ilanes a[(ROWS + 3) / 4];
        EACH(j, vectors) b[j] = iload(t->v8 + (group * t->dim + column + j * WIDTH) * 4);
        EACH(i, (rows + 3) / 4) a[i] = ilanes_at(t->p8 + group * STRIP + row + 4 * i);
        EACH(i, rows)
            EACH(j, vectors) sum[i][j] = dot4_lane(sum[i][j], a[i / 4], i % 4, b[j]);
    }
    EACH(i, rows)
        EACH(j, vectors) {
            float *o = t->o + (row + i) * t->dim + column + j * WIDTH;
            vec fresh = vmul(to_float(sum[i][j]), vset(t->beta[row + i]));
            vstore(o, vfma(vload(o), vset(t->alpha[row + i]), fresh));
        }
}

INLINE void pv8_rows(const dsa_strip *t, int column, const int vectors) {
    int r = 0;
    for (; r + ROWS <= t->rows; r += ROWS) pv8_tile(t, r, column, ROWS, vectors);
    for (; ROWS > 4 && r + 4 <= t->rows; r += 4) pv8_tile(t, r, column, 4, vectors);
    for (; r < t->rows; r++) pv8_tile(t, r, column, 1, vectors);
}

static void pv8(const dsa_strip *t) {
    int d = 0;
    for (; d + STRIP <= t->dim; d += STRIP) pv8_rows(t, d, 2);
    for (; d < t->dim; d += WIDTH) pv8_rows(t, d, 1);
}

#define KERNEL_SET(set)                                                                                         \
    const dsa_kernel_set dsa_kernels_##set = {#set,  WIDTH,    load_q, qk,      softmax, pv,     store_rows, \
                                              load8, qk8, softmax8, pv8, shift, sums, peaks, pack_k, pack_v}
