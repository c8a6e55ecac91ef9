/* Loops that need no intrinsics: every kernel set compiles its own copy with its own flags, and the compiler vectorises.
 * The including file defines STRIP, Q_SHIFT and P_SHIFT: what the set adds to the bytes of Q and subtracts from those of P
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

static void columns(const float *x, ptrdiff_t row, int rows, int dim, float *sum, float *peak) {
    for (int d = 0; d < dim; d += 16) {
        float total[16] = {0}, most[16] = {0};
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 16; i++) {
                float a = x[r * row + d + i];
                total[i] += a;
                a = a < 0 ? -a : a;
                most[i] = a > most[i] ? a : most[i];
            }
        for (int i = 0; i < 16; i++) {
            if (sum) sum[d + i] += total[i];
            if (peak && most[i] > peak[d + i]) peak[d + i] = most[i];
        }
    }
}

static void store_rows(const dsa_strip *t, const float *channel, float *out, ptrdiff_t row) {
    for (int r = 0; r < t->rows; r++) {
        /* A row that saw a token has a sum of about 1 or more, or NaN; one that saw nothing has (nearly) 0. */
        float inverse = t->sum[r] < 0.5f ? 0 : 1 / t->sum[r];
        const float *o = t->o + (ptrdiff_t)r * t->dim;
        for (int d = 0; d < t->dim; d++) out[r * row + d] = o[d] * inverse * (channel ? channel[d] : 1);
    }
}

static float peak_of(const float *x, int dim) {
    float most[16] = {0}, peak = 0;
    for (int d = 0; d < dim; d += 16)
        for (int i = 0; i < 16; i++) {
            float a = x[d + i] < 0 ? -x[d + i] : x[d + i];
            most[i] = a > most[i] ? a : most[i];
        }
    for (int i = 0; i < 16; i++) peak = most[i] > peak ? most[i] : peak;
    return peak;
}

/* One scale per query row; four consecutive bytes of a row make a word. */
static void load8(const dsa_strip *t, const float *q, ptrdiff_t row, float scale) {
    for (int r = 0; r < t->lanes; r++) {
        const float *x = q + r * row;
        float peak = r < t->rows ? peak_of(x, t->dim) : 0, inverse = peak > 0 ? 127 / peak : 0;
        t->q_scale[r] = peak * scale * (1.0f / 127);
        for (int d = 0; d < t->dim; d += 4) {
            int32_t *to = t->q8 + d / 4 * STRIP + r;
            if (peak > 0)
                *to = word(nearest(x[d] * inverse) + Q_SHIFT, nearest(x[d + 1] * inverse) + Q_SHIFT,
                           nearest(x[d + 2] * inverse) + Q_SHIFT, nearest(x[d + 3] * inverse) + Q_SHIFT);
            else
                *to = word(Q_SHIFT, Q_SHIFT, Q_SHIFT, Q_SHIFT);
        }
    }
}

static void pack_k(const float *k, ptrdiff_t row, int keys, int dim, const float *mean, int8_t *k8, int32_t *k_sum,
                   float *k_scale) {
    float most[16] = {0}, peak = 0;
    for (int d = 0; d < dim; d += 16)
        for (int r = 0; r < keys; r++)
            for (int i = 0; i < 16; i++) {
                float a = k[r * row + d + i] - mean[d + i];
                a = a < 0 ? -a : a;
                most[i] = a > most[i] ? a : most[i];
            }
    for (int i = 0; i < 16; i++) peak = most[i] > peak ? most[i] : peak;
    float inverse = peak > 0 ? 127 / peak : 0;
    *k_scale = peak * (1.0f / 127);
    for (int r = 0; r < keys; r++) {
        int32_t sum = 0;
        for (int d = 0; d < dim; d++) {
            int32_t a = nearest((k[r * row + d] - mean[d]) * inverse);
            k8[r * dim + d] = (int8_t)a;
            sum += a;
        }
        k_sum[r] = sum;
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
