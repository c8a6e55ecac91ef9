#include "kernels.h"
#include <immintrin.h>

typedef __m256 vec;
typedef __m256i ivec;
typedef const float *lanes; /* a broadcast from memory costs no more than a load */
typedef const char *ilanes;
#define WIDTH 8
#define VECTORS 2
#define ROWS(vectors) 6 /* 12 accumulators of 16 registers */
#define K_SHIFT 128
#define P_SHIFT 0
#define vload _mm256_loadu_ps
#define vstore _mm256_storeu_ps
#define vset _mm256_set1_ps
#define vadd _mm256_add_ps
#define vsub _mm256_sub_ps
#define vmul _mm256_mul_ps
#define vdiv _mm256_div_ps
#define vabs(x) _mm256_andnot_ps(vset(-0.0f), x)
#define vmax _mm256_max_ps
#define vfma _mm256_fmadd_ps
#define vexponent(t) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23))
#define lanes_at(p) (p)
#define lane(a, i) vset((a)[i])
#define iload(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define istore(p, x) _mm256_storeu_si256((__m256i *)(void *)(p), x)
#define iset _mm256_set1_epi32
#define iadd _mm256_add_epi32
#define imul _mm256_mullo_epi32
#define ipush(a, b) _mm256_or_si256(_mm256_slli_epi32(a, 8), _mm256_and_si256(b, iset(255)))
#define ixor _mm256_xor_si256
#define as_int _mm256_castps_si256
#define to_float _mm256_cvtepi32_ps
#define ilanes_at(p) ((const char *)(p))
#define ilane(a, i) iset(*(const word32 *)(const void *)((a) + 4 * (i)))
typedef int32_t word32 __attribute__((aligned(1), may_alias));

static inline void store_bytes(int8_t *p, __m256i x) {
    const __m256i pick = _mm256_set1_epi32(12 << 24 | 8 << 16 | 4 << 8); /* bytes 0, 4, 8 and 12 of each half */
    __m256i words = _mm256_shuffle_epi8(x, pick);
    *(word32 *)(void *)p = _mm256_extract_epi32(words, 0);
    *(word32 *)(void *)(p + 4) = _mm256_extract_epi32(words, 4);
}

/* sum + the four products u8 x s8 of each word; vpmaddubsw would saturate at 16 bits */
static inline __m256i dot4(__m256i sum, __m256i u8, __m256i s8) {
    const __m256i even = _mm256_set1_epi16(255);
    __m256i a = _mm256_madd_epi16(_mm256_and_si256(u8, even), _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8));
    __m256i b = _mm256_madd_epi16(_mm256_srli_epi16(u8, 8), _mm256_srai_epi16(s8, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
}
#define dot4_lane(sum, a, i, b) dot4(sum, ilane(a, i), b)
#include "kernel_simd.h"

KERNEL_SET(avx2);
