/* What needs no intrinsics: every kernel set compiles its own copy with its own flags, and the compiler vectorises. */

#define ROUND 12582912.0f /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */

/* out = channel * o / sum; channel NULL: 1 */
static void store_rows(const dsa_strip *t, const float *channel, float *out, ptrdiff_t row) {
    for (int r = 0; r < t->rows; r++) {
        /* A row that saw a token has a sum of about 1 or more, or NaN; one that saw nothing has (nearly) 0. */
        float inverse = t->sum[r] < 0.5f ? 0 : 1 / t->sum[r];
        const float *o = t->o + (ptrdiff_t)r * t->dim;
        for (int d = 0; d < t->dim; d++) out[r * row + d] = o[d] * inverse * (channel ? channel[d] : 1);
    }
}

/* The columns of a product from x on. */
static void product_columns(const dsa_product *p, int x) {
#pragma STDC FP_CONTRACT OFF
    for (; x < p->columns; x++)
        for (int i = 0; i < p->rows; i++) {
            float sum = 0;
            for (int d = 0; d < p->depth; d++) sum += p->a[i * p->depth + d] * p->w[d * p->w_row + x];
            p->out[i * p->out_row + x * p->out_column] = sum;
        }
}
