/* Loops that need no intrinsics: every kernel set compiles its own copy with its own flags, and the compiler vectorises.
 * The including file defines STRIP, K_SHIFT and P_SHIFT: what the set adds to the bytes of K and subtracts from those of P
 * because its dot product wants one unsigned operand (VNNI) or two signed ones (sdot). */

#define ROUND 12582912.0f /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */

static inline int32_t bits(float x) {
    union {
        float f;
        int32_t i;
    } u = {x};
    return u.i;
}

/* Nearest integer of |x| < 2^22, without libc. */
static inline int32_t nearest(float x) { return bits(x + ROUND) - bits(ROUND); }

static inline int32_t word(int a, int b, int c, int d) {
    return (int32_t)((uint32_t)(a & 255) | (uint32_t)(b & 255) << 8 | (uint32_t)(c & 255) << 16 | (uint32_t)d << 24);
}

static void store_rows(const dsa_strip *t, const float *channel, float *out, ptrdiff_t row) {
    for (int r = 0; r < t->rows; r++) {
        /* A row that saw a token has a sum of about 1 or more, or NaN; one that saw nothing has (nearly) 0. */
        float inverse = t->sum[r] < 0.5f ? 0 : 1 / t->sum[r];
        const float *o = t->o + (ptrdiff_t)r * t->dim;
        for (int d = 0; d < t->dim; d++) out[r * row + d] = o[d] * inverse * (channel ? channel[d] : 1);
    }
}

/* Four keys of one channel make a word; missing keys are 0. */
static void pack_v(const float *v, ptrdiff_t row, int keys, int dim, const float *scale, int8_t *v8, int32_t *v_sum) {
    for (int d = 0; d < dim; d++) v_sum[d] = 0;
    for (int r = 0; r < keys; r += 4) {
        int32_t *to = (int32_t *)(void *)(v8 + r * dim);
        const float *x[4];
        float use[4];
        for (int i = 0; i < 4; i++) {
            x[i] = v + (r + i < keys ? r + i : r) * row;
            use[i] = r + i < keys;
        }
        for (int d = 0; d < dim; d++) {
            float inverse = scale[d] > 0 ? 1 / scale[d] : 0;
            int32_t a = nearest(x[0][d] * inverse), b = nearest(x[1][d] * inverse * use[1]),
                    c = nearest(x[2][d] * inverse * use[2]), e = nearest(x[3][d] * inverse * use[3]);
            to[d] = word(a, b, c, e);
            v_sum[d] += a + b + c + e;
        }
    }
}
