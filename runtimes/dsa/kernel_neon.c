/* kernel_neon_dotprod.c includes this file: only the dot product differs. */
#include "kernels.h"
#include <arm_neon.h>

typedef float32x4_t vec;
typedef int32x4_t ivec;
typedef float32x4_t lanes; /* one load, then fmla by element */
typedef int32x4_t ilanes;
#define WIDTH 4
#define VECTORS 2
#define ROWS(vectors) 8
#define K_SHIFT 0
#define P_SHIFT 128 /* sdot is signed by signed */
#define vload vld1q_f32
#define vstore vst1q_f32
#define vset vdupq_n_f32
#define vadd vaddq_f32
#define vsub vsubq_f32
#define vmul vmulq_f32
#define vdiv vdivq_f32
#define vabs vabsq_f32
#define vmax vmaxq_f32
#define vfma(a, b, sum) vfmaq_f32(sum, a, b)
#define vexponent(t) vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(t), 23))
#define lanes_at vld1q_f32
#define lane(a, i) vset((a)[i])
#define iload(p) vreinterpretq_s32_s8(vld1q_s8((const int8_t *)(p)))
#define istore(p, x) vst1q_s32((int32_t *)(void *)(p), x)
#define iset vdupq_n_s32
#define iadd vaddq_s32
#define imul vmulq_s32
#define ipush(a, b) vsliq_n_s32(b, a, 8)
#define ixor veorq_s32
#define as_int vreinterpretq_s32_f32
#define to_float vcvtq_f32_s32
#define ilanes_at iload

static inline void store_bytes(int8_t *p, int32x4_t x) {
    int16x4_t half = vmovn_s32(x);
    vst1_lane_s32((int32_t *)(void *)p, vreinterpret_s32_s8(vmovn_s16(vcombine_s16(half, half))), 0);
}

/* sum + the four products s8 x s8 of each word; symmetric */
static inline int32x4_t dot4(int32x4_t sum, int32x4_t a, int32x4_t b) {
    int8x16_t x = vreinterpretq_s8_s32(a), y = vreinterpretq_s8_s32(b);
#ifdef DOTPROD
    return vdotq_s32(sum, x, y);
#else
    /* Pairs fit 16 bits: |P - 128| <= 128 and |K|, |Q|, |V| <= 127. */
    int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y)), high = vmull_high_s8(x, y);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
}
/* By element. As a switch, because the lane must be a constant where the intrinsic stands; unrolling makes it one. */
static inline int32x4_t dot4_lane(int32x4_t sum, int32x4_t a, int i, int32x4_t b) {
#ifdef DOTPROD
    int8x16_t x = vreinterpretq_s8_s32(a), y = vreinterpretq_s8_s32(b);
    switch (i) {
    case 0: return vdotq_laneq_s32(sum, y, x, 0);
    case 1: return vdotq_laneq_s32(sum, y, x, 1);
    case 2: return vdotq_laneq_s32(sum, y, x, 2);
    default: return vdotq_laneq_s32(sum, y, x, 3);
    }
#else
    return dot4(sum, iset(a[i]), b);
#endif
}
#include "kernel_simd.h"

#ifdef DOTPROD
KERNEL_SET(neon_dotprod);
#else
KERNEL_SET(neon);
#endif
