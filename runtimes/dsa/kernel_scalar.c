/* The plain loops every other kernel set must agree with. */
#include "kernels.h"

#define WIDTH 8
#define STRIP (2 * WIDTH)
#include "kernel_plain.h"

static int32_t bits(float x) {
    union {
        float f;
        int32_t i;
    } u = {x};
    return u.i;
}

/* Nearest integer of |x| < 2^22, without libc. */
static int32_t nearest(float x) { return bits(x + ROUND) - bits(ROUND); }

static int32_t word(int a, int b, int c, int d) {
    return (int32_t)((uint32_t)(a & 255) | (uint32_t)(b & 255) << 8 | (uint32_t)(c & 255) << 16 | (uint32_t)d << 24);
}

/* 2^x for x <= 8; below -126 it stays at 2^-126. NaN stays NaN. */
static float exp2_of(float x) {
    union {
        int32_t i;
        float f;
    } two_n;
    x = x < -126.0f ? -126.0f : x;
    float t = x + ROUND, f = x - (t - ROUND);
    two_n.i = (int32_t)((uint32_t)(bits(t) - bits(ROUND) + 127) << 23);
    float p = 9.671512991e-3f + 1.326472731e-3f * f;
    p = 2.402224243e-1f + (5.550733581e-2f + p * f) * f;
    return (1.0f + (6.931470037e-1f + p * f) * f) * two_n.f;
}

static void load_q(const dsa_strip *t, const float *q, ptrdiff_t row, float scale) {
    for (int r = 0; r < t->lanes; r++)
        for (int d = 0; d < t->dim; d++) t->q[d * STRIP + r] = r < t->rows ? q[r * row + d] * scale : 0;
}

static void raise(const dsa_strip *t, int key, int r, float s) {
    t->s[key * STRIP + r] = s;
    if (key == 0) t->high[r] = -1e30f;
    if (s > t->high[r]) t->high[r] = s;
}

static void qk(const dsa_strip *t) {
    for (int key = 0; key < t->keys; key++)
        for (int r = 0; r < t->lanes; r++) {
            float s = 0;
            for (int d = 0; d < t->dim; d++) s += t->q[d * STRIP + r] * t->k[key * t->k_row + d];
            raise(t, key, r, s);
        }
}

static void shift(const dsa_strip *t, const float *by) {
    for (int key = 0; key < t->keys; key++)
        for (int r = 0; r < t->lanes; r++) raise(t, key, r, t->s[key * STRIP + r] + by[t->keys - 1 - key + r]);
}

static void hide(const dsa_strip *t) {
    for (int key = 0; key < t->keys; key++)
        for (int r = 0; r < t->lanes; r++) raise(t, key, r, key < t->past + r ? t->s[key * STRIP + r] : -__builtin_inff());
}

static void softmax(const dsa_strip *t) {
    for (int r = 0; r < t->lanes; r++) {
        float top = t->high[r] > t->top[r] ? t->high[r] : t->top[r], sum = 0;
        t->alpha[r] = exp2_of(t->top[r] - top);
        for (int key = 0; key < t->keys; key++) sum += t->s[key * STRIP + r] = exp2_of(t->s[key * STRIP + r] - top);
        t->top[r] = top;
        t->sum[r] = t->sum[r] * t->alpha[r] + sum;
    }
}

static void pv(const dsa_strip *t) {
    for (int r = 0; r < t->rows; r++)
        for (int d = 0; d < t->dim; d++) {
            float sum = t->o[r * t->dim + d] * t->alpha[r];
            for (int key = 0; key < t->keys; key++) sum += t->s[key * STRIP + r] * t->v[key * t->v_row + d];
            t->o[r * t->dim + d] = sum;
        }
}

static void means_of(dsa_pool p, int dim) {
    for (; p.rows > 0; p.rows -= p.block, p.x += p.block * p.row, p.mean += dim) {
        int n = p.rows < p.block ? p.rows : p.block;
        for (int d = 0; d < dim; d++) p.mean[d] = 0;
        for (int r = 0; r < n; r++)
            for (int d = 0; d < dim; d++) p.mean[d] += p.x[r * p.row + d];
        for (int d = 0; d < dim; d++) p.mean[d] /= (float)n;
    }
}

static void means(dsa_pool one, dsa_pool other, int dim) {
    means_of(one, dim);
    means_of(other, dim);
}

static void product(const dsa_product *p) { product_columns(p, 0); }

static float larger(float most, float x) {
    x = x < 0 ? -x : x;
    return x > most ? x : most;
}

static void peaks(const float *x, ptrdiff_t row, int rows, int dim, float *peak) {
    for (int d = 0; d < dim; d++) peak[d] = 0;
    for (int r = 0; r < rows; r++)
        for (int d = 0; d < dim; d++) peak[d] = larger(peak[d], x[r * row + d]);
}

static void load8(const dsa_strip *t, const float *q, ptrdiff_t row, float scale) {
    for (int r = 0; r < t->lanes; r++) {
        float peak = 1e-30f;
        for (int d = 0; d < t->dim && r < t->rows; d++) peak = larger(peak, q[r * row + d]);
        t->q_scale[r] = peak * (scale / 127);
        t->q_sum[r] = 0; /* needed only by sets that shift the bytes of K */
        for (int d = 0; d < t->dim; d += 4) {
            int32_t a[4];
            for (int i = 0; i < 4; i++) a[i] = r < t->rows ? nearest(q[r * row + d + i] * (127 / peak)) : 0;
            t->q8[d / 4 * STRIP + r] = word(a[0], a[1], a[2], a[3]);
        }
    }
}

static void pack_k(const float *k, ptrdiff_t row, int keys, int dim, const float *mean, int8_t *k8, float *k_scale) {
    float peak = 1e-30f;
    for (int r = 0; r < keys; r++)
        for (int d = 0; d < dim; d++) peak = larger(peak, k[r * row + d] - mean[d]);
    *k_scale = peak / 127;
    for (int r = 0; r < keys; r++)
        for (int d = 0; d < dim; d++) k8[r * dim + d] = (int8_t)nearest((k[r * row + d] - mean[d]) * (127 / peak));
}

static void pack_v(const float *v, ptrdiff_t row, int keys, int dim, const float *scale, int8_t *v8, int32_t *v_sum) {
    for (int d = 0; d < dim; d++) {
        v_sum[d] = 0; /* needed only by sets that shift the bytes of P */
        for (int r = 0; r < (keys + 3) / 4 * 4; r++)
            v8[(r / 4 * dim + d) * 4 + r % 4] = (int8_t)(r < keys ? nearest(v[r * row + d] * (1 / scale[d])) : 0);
    }
}

static int8_t byte(int32_t w, int i) { return (int8_t)((uint32_t)w >> 8 * i); }

static void qk8(const dsa_strip *t) {
    for (int key = 0; key < t->keys; key++)
        for (int r = 0; r < t->lanes; r++) {
            int32_t sum = 0;
            for (int d = 0; d < t->dim; d++) sum += byte(t->q8[d / 4 * STRIP + r], d % 4) * t->k8[key * t->dim + d];
            raise(t, key, r, (float)sum * (t->q_scale[r] * t->k_scale));
        }
}

static void softmax8(const dsa_strip *t) {
    const float log2_255 = 7.99435343686f;
    for (int r = 0; r < t->lanes; r++) {
        float high = t->high[r], top = high > t->top[r] ? high : t->top[r];
        int32_t sum = 0, p[4];
        t->alpha[r] = exp2_of(t->top[r] - top);
        t->beta[r] = exp2_of(high - top) * (1.0f / 255);
        for (int key = 0; key < t->keys; key += 4) {
            for (int i = 0; i < 4; i++) {
                p[i] = key + i < t->keys ? nearest(exp2_of(t->s[(key + i) * STRIP + r] - (high - log2_255))) : 0;
                sum += p[i];
            }
            t->p8[key / 4 * STRIP + r] = word(p[0], p[1], p[2], p[3]);
        }
        t->top[r] = top;
        t->sum[r] = t->sum[r] * t->alpha[r] + (float)sum * t->beta[r];
    }
}

static void pv8(const dsa_strip *t) {
    for (int r = 0; r < t->rows; r++)
        for (int d = 0; d < t->dim; d++) {
            int32_t sum = 0;
            for (int key = 0; key < t->keys; key++)
                sum += (uint8_t)byte(t->p8[key / 4 * STRIP + r], key % 4) * t->v8[(key / 4 * t->dim + d) * 4 + key % 4];
            t->o[r * t->dim + d] = t->o[r * t->dim + d] * t->alpha[r] + (float)sum * t->beta[r];
        }
}

const dsa_kernel_set dsa_kernels_scalar = {"scalar", WIDTH, STRIP, load_q, qk,   softmax, pv,      store_rows, load8,
                                           qk8,      softmax8, pv8, shift, hide, means,   product, peaks,      pack_k,
                                           pack_v};
