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
