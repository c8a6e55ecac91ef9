/* kernel_avx512_vnni.c includes this file: only the dot product differs. */
#include "kernels.h"
#include <immintrin.h>

typedef __m512 vec;
typedef __m512i ivec;
typedef const float *lanes; /* a broadcast from memory costs no more than a load */
typedef const char *ilanes;
#define WIDTH 16
#define VECTORS 4
#define ROWS(vectors) ((vectors) == 4 ? 6 : 8) /* 24 or 16 accumulators of 32 registers */
#define K_SHIFT 128
#define P_SHIFT 0
#define vload _mm512_loadu_ps
#define vstore _mm512_storeu_ps
#define vset _mm512_set1_ps
#define vadd _mm512_add_ps
#define vsub _mm512_sub_ps
#define vmul _mm512_mul_ps
#define vdiv _mm512_div_ps
#define vabs _mm512_abs_ps
#define vmax _mm512_max_ps
#define vfma _mm512_fmadd_ps
#define vexponent(t) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23))
#define lanes_at(p) (p)
#define lane(a, i) vset((a)[i])
#define iload(p) _mm512_loadu_si512(p)
#define istore(p, x) _mm512_storeu_si512(p, x)
#define iset _mm512_set1_epi32
#define iadd _mm512_add_epi32
#define imul _mm512_mullo_epi32
/* bits of the mask from b, the others from a << 8 */
#define ipush(a, b) _mm512_ternarylogic_epi32(iset(255), b, _mm512_slli_epi32(a, 8), 0xca)
#define ixor _mm512_xor_si512
#define store_bytes(p, x) _mm_storeu_si128((__m128i *)(void *)(p), _mm512_cvtepi32_epi8(x))
#define as_int _mm512_castps_si512
#define to_float _mm512_cvtepi32_ps
#define ilanes_at(p) ((const char *)(p))
#define ilane(a, i) iset(*(const word32 *)(const void *)((a) + 4 * (i)))
typedef int32_t word32 __attribute__((aligned(1), may_alias));

/* sum + the four products u8 x s8 of each word */
#ifdef VNNI
#define dot4 _mm512_dpbusd_epi32
#else
static inline __m512i dot4(__m512i sum, __m512i u8, __m512i s8) {
    const __m512i even = _mm512_set1_epi16(255);
    __m512i a = _mm512_madd_epi16(_mm512_and_si512(u8, even), _mm512_srai_epi16(_mm512_slli_epi16(s8, 8), 8));
    __m512i b = _mm512_madd_epi16(_mm512_srli_epi16(u8, 8), _mm512_srai_epi16(s8, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(a, b));
}
#endif
#define dot4_lane(sum, a, i, b) dot4(sum, ilane(a, i), b)
#include "kernel_simd.h"

#ifdef VNNI
KERNEL_SET(avx512_vnni);
#else
KERNEL_SET(avx512);
#endif
