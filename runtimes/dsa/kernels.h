/* What a kernel set provides: the loops over one strip of queries and one key block. dsa.c does the rest. */
#ifndef DSA_KERNELS_H
#define DSA_KERNELS_H
#include <stddef.h>
#include <stdint.h>

enum { DSA_CPU_AVX2 = 1, DSA_CPU_AVX512 = 2, DSA_CPU_VNNI = 4, DSA_CPU_NEON = 8, DSA_CPU_DOTPROD = 16 };
unsigned dsa_cpu(void);

/* Rows that are read soon: asked for meanwhile, so that they come from far memory while there is other work. */
typedef struct {
    const float *x; /* NULL: none */
    ptrdiff_t row;
    int32_t mask, part; /* of them, those whose number & mask is part */
} dsa_rows;

/* A strip is some vectors of queries: one query per lane. Logits are computed transposed, [key][query], so that
 * K and V are read where they are, softmax needs no horizontal step, and P is already the packed operand of PV. */
#define NO_FUTURE (1 << 20)
typedef struct {
    int32_t rows, lanes; /* queries; the same rounded up to whole vectors */
    int32_t keys, dim;
    int32_t past; /* keys the first query sees; each later one sees one more, up to all (NO_FUTURE: all see all) */
    const float *k, *v; /* [keys][dim] with these row strides */
    ptrdiff_t k_row, v_row;
    dsa_rows by_qk, by_pv;                    /* what they ask for: by_qk [keys][dim], by_pv [rows][dim] */
    float *q;                                 /* [dim][strip], scaled by scale * log2(e) */
    float *s;                                 /* [keys][strip]: logits, then probabilities */
    float *high;                              /* [strip]: highest logit of this block */
    float *top, *sum, *alpha, *beta;          /* [strip]: running maximum, sum; this step's factors of O and P V */
    float *o;                                 /* [rows][dim], not yet divided by sum */
    const int8_t *k8, *v8;                    /* i8: [keys][dim]; [ceil(keys/4)][dim][4] */
    const int32_t *v_sum;                     /* i8: [dim], sum of v8 over the keys */
    float k_scale;                            /* i8: one per block */
    float *q_scale;                           /* i8: [strip] */
    int32_t *q_sum;                           /* i8: [strip], sum of q8 over dim */
    int32_t *q8, *p8;                         /* i8: four bytes a word, [dim/4][strip] and [ceil(keys/4)][strip] */
} dsa_strip;

/* mean[i][dim] = the mean of x[i * block ..][dim], `block` rows or what is left of `rows`, added in row order */
typedef struct {
    const float *x;
    ptrdiff_t row;
    int32_t rows, block;
    float *mean;
} dsa_pool;

/* out[i * out_row + x * out_column] = sum over d of a[i][d] * w[d * w_row + x] */
typedef struct {
    int32_t rows, depth, columns;
    const float *a, *w; /* [rows][depth]; [depth][columns] */
    ptrdiff_t w_row;
    float *out;
    ptrdiff_t out_row, out_column;
} dsa_product;

typedef struct {
    const char *name;
    int32_t width, strip; /* floats in a vector, queries in a strip */
    void (*load)(const dsa_strip *t, const float *q, ptrdiff_t row, float scale); /* q[rows][dim] into the strip */
    void (*qk)(const dsa_strip *t);                                               /* s and high */
    void (*softmax)(const dsa_strip *t);                                          /* s, top, sum, alpha */
    void (*pv)(const dsa_strip *t);                                               /* o = alpha * o + p v */
    /* out[rows][dim] = channel * o / sum, 0 where nothing was seen; channel NULL: 1 */
    void (*store)(const dsa_strip *t, const float *channel, float *out, ptrdiff_t row);
    void (*load8)(const dsa_strip *t, const float *q, ptrdiff_t row, float scale);
    void (*qk8)(const dsa_strip *t);
    void (*softmax8)(const dsa_strip *t);
    void (*pv8)(const dsa_strip *t);
    /* s += by[keys - 1 - key + query], and high again: what lies on a diagonal gets the same */
    void (*shift)(const dsa_strip *t, const float *by);
    /* s = -inf where a query does not see the key, and high again */
    void (*hide)(const dsa_strip *t);
    /* Two at once: what comes from far memory comes faster from two places */
    void (*means)(dsa_pool one, dsa_pool other, int dim);
    /* Terms are added in order and unfused: the same bits on every CPU */
    void (*product)(const dsa_product *p);
    /* The largest |x| per column of x[rows][dim] */
    void (*peaks)(const float *x, ptrdiff_t row, int rows, int dim, float *peak);
    /* One key block: k8 = (k - mean) / *k_scale; v8 = v / scale, v_sum its sum over the keys */
    void (*pack_k)(const float *k, ptrdiff_t row, int keys, int dim, const float *mean, int8_t *k8, float *k_scale);
    void (*pack_v)(const float *v, ptrdiff_t row, int keys, int dim, const float *scale, int8_t *v8, int32_t *v_sum);
} dsa_kernel_set;

#define DSA_KERNELS(name, needs, flags) extern const dsa_kernel_set dsa_kernels_##name;
#include "kernels.inc"
#undef DSA_KERNELS

const dsa_kernel_set *dsa_best(void);
#endif
