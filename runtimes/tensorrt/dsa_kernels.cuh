// edgeformer block-DSA on the GPU: pool, select, attend. C++14; fp32 or fp16 storage, fp32 arithmetic; sm_53 and later.
// Shared memory and barriers only, no warp intrinsics, at most 48 KB a block: a test runs this file on a CPU.
#pragma once
#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#define DSA_SHARED(name) extern __shared__ float name[]
#define DSA_LAUNCH(kernel, grid, threads, bytes, stream, ...) kernel<<<grid, threads, bytes, stream>>>(__VA_ARGS__)
typedef dim3 dsa_dim3;
typedef __half dsa_half;
#else
#include "cuda_shim.h"
#endif
#include <stddef.h>
#include <stdint.h>

namespace edgeformer {

// The node's attributes, as they are serialized into an engine.
struct Rules {
    int32_t block_q, block_k, rule, min_blocks, max_blocks, force_diag, n_sink;
    int32_t causal, q_offset, select_per_kv, dense_below;
    float scale;  // 0: 1 / sqrt(dim)
};

// Everything a launch knows about one call.
struct Call {
    Rules rules;
    int32_t batch, heads, kv_heads, rows, keys, dim, rank, reach, sinks;
    int32_t positions;  // how far the position bias reaches; 0: it is the same for all keys, and left out
    int32_t q_blocks, k_blocks, lists;  // lists: kv_heads if select_per_kv, else heads
};

// Operands on the device: q (batch, heads, rows, dim), k and v (batch, kv_heads, keys, dim), the scorer, lengths (batch).
template <typename T>
struct Operands {
    const T *q, *k, *v;
    const float *wq, *wk, *dist_bias, *sink_bias, *theta;
    const int32_t *q_len, *kv_len;
    const float *position_bias;  // (heads, 2 * positions + 1): added to the logits by key - query position
};

enum { THRESHOLD, TOP_P, TOP_K };
enum { TILE = 32, SELECT_THREADS = 64, MOST_SHARED = 48 * 1024 };

__device__ inline float load(const float *p) { return *p; }
__device__ inline float load(const dsa_half *p) { return __half2float(*p); }
__device__ inline void store(float *p, float x) { *p = x; }
__device__ inline void store(dsa_half *p, float x) { *p = __float2half(x); }
__device__ inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
__device__ inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// grid (max(q_blocks, k_blocks), batch * heads, 2), threads dim. The mean of a block's valid rows, added in row order,
// then the projection: out is (2, batch * heads, max(q_blocks, k_blocks), rank), queries first.
template <typename T>
__global__ void pool_project(Operands<T> in, float *out, Call c) {
    DSA_SHARED(mean);
    const bool keys = blockIdx.z == 1;
    const int32_t block = blockIdx.x, list = blockIdx.y, d = threadIdx.x, b = list / c.heads, h = list % c.heads;
    const int32_t size = keys ? c.rules.block_k : c.rules.block_q, all = keys ? c.keys : c.rows;
    const int32_t valid = larger(0, smaller(keys ? in.kv_len[b] : in.q_len[b], all));
    const int32_t head = keys ? b * c.kv_heads + h * c.kv_heads / c.heads : list;
    const T *x = (keys ? in.k : in.q) + (size_t)head * all * c.dim;
    const int32_t first = block * size, last = smaller(first + size, valid);
    float sum = 0.0f;
    for (int32_t t = first; t < last; ++t) sum += load(x + (size_t)t * c.dim + d);
    mean[d] = last > first ? sum / (float)(last - first) : 0.0f;
    __syncthreads();
    const float *w = (keys ? in.wk : in.wq) + (size_t)h * c.dim * c.rank;
    const int32_t blocks = larger(c.q_blocks, c.k_blocks);
    float *to = out + (((size_t)(keys ? c.batch * c.heads : 0) + list) * blocks + block) * c.rank;
    for (int32_t r = d; r < c.rank; r += c.dim) {
        float z = 0.0f;
        for (int32_t e = 0; e < c.dim; ++e) z += mean[e] * w[(size_t)e * c.rank + r];
        to[r] = z;
    }
}

// The score of key block j for one query head; NaN is no score at all.
template <typename T>
__device__ inline float score(const Operands<T> &in, const float *pooled, const Call &c, int32_t b, int32_t h,
                              int32_t i, int32_t j) {
    const size_t blocks = larger(c.q_blocks, c.k_blocks), list = (size_t)b * c.heads + h;
    const float *zq = pooled + (list * blocks + i) * c.rank;
    const float *zk = pooled + (((size_t)c.batch * c.heads + list) * blocks + j) * c.rank;
    float z = 0.0f;
    for (int32_t r = 0; r < c.rank; ++r) z += zq[r] * zk[r];
    const int32_t here = (c.rules.q_offset + i * c.rules.block_q) / c.rules.block_k;
    const int32_t at = larger(-c.reach, smaller(j - here, c.reach)) + c.reach;
    z += in.dist_bias[(size_t)h * (2 * c.reach + 1) + at];
    if (j < c.sinks) z += in.sink_bias[(size_t)h * c.sinks + j];
    return z != z ? -INFINITY : fminf(z, 3e38f);
}

// Adds one head's softmax over candidates 0..n-1 to `mass`; every thread of the block calls it.
template <typename T>
__device__ inline void add_mass(const Operands<T> &in, const float *pooled, const Call &c, int32_t b, int32_t h,
                                int32_t i, int32_t n, float *z, float *mass) {
    for (int32_t j = threadIdx.x; j < n; j += SELECT_THREADS) z[j] = score(in, pooled, c, b, h, i, j);
    __syncthreads();
    if (threadIdx.x == 0) {  // one thread: the order of the sum is part of the definition
        float top = -INFINITY, sum = 0.0f;
        for (int32_t j = 0; j < n; ++j) top = fmaxf(top, z[j]);
        for (int32_t j = 0; j < n; ++j) {
            z[j] = top == -INFINITY ? 0.0f : expf(z[j] - top);
            sum += z[j];
        }
        for (int32_t j = 0; j < n; ++j) mass[j] += sum > 0.0f ? z[j] / sum : 0.0f;
    }
    __syncthreads();
}

// How many of the n candidates are kept, of which `must` are forced. `order` holds them best first.
__device__ inline int32_t how_many(const Call &c, const float *mass, const int32_t *order, int32_t n, int32_t must,
                                   float theta) {
    int32_t keep = must;
    if (c.keys <= c.rules.dense_below) {
        keep = n;
    } else if (c.rules.rule == THRESHOLD) {
        while (keep < n && mass[order[keep]] >= theta) ++keep;
    } else if (c.rules.rule == TOP_K) {
        keep = larger(must, theta >= (float)n ? n : (int32_t)theta);
    } else {
        float reached = 0.0f;
        for (int32_t x = 0; x < must; ++x) reached += mass[order[x]];
        while (keep < n && (theta >= 1.0f || reached < theta)) reached += mass[order[keep++]];
    }
    keep = larger(keep, smaller(c.rules.min_blocks, n));
    return smaller(keep, c.rules.max_blocks ? smaller(c.rules.max_blocks, n) : n);
}

// How many key blocks query block i may choose from.
template <typename T>
__device__ inline int32_t candidates(const Operands<T> &in, const Call &c, int32_t b, int32_t i) {
    const Rules &r = c.rules;
    const int32_t valid_q = smaller(in.q_len[b], c.rows), valid_k = smaller(in.kv_len[b], c.keys);
    const int32_t last = r.q_offset + smaller((i + 1) * r.block_q, valid_q) - 1;
    if (i * r.block_q >= valid_q || valid_k <= 0) return 0;
    const int32_t n = (valid_k + r.block_k - 1) / r.block_k;
    return !r.causal ? n : last < 0 ? 0 : smaller(n, last / r.block_k + 1);
}

// grid (q_blocks, batch * lists), threads SELECT_THREADS, shared 3 * k_blocks. A list is a count, then the kept key
// blocks in ascending order: kept is (batch * lists, q_blocks, 1 + k_blocks).
template <typename T>
__global__ void select_blocks(Operands<T> in, const float *pooled, int32_t *kept, Call c) {
    DSA_SHARED(shared);
    float *z = shared, *mass = shared + c.k_blocks;
    int32_t *order = (int32_t *)(shared + 2 * c.k_blocks);
    const Rules &r = c.rules;
    const int32_t i = blockIdx.x, list = blockIdx.y, b = list / c.lists, s = list % c.lists;
    const int32_t first = r.q_offset + i * r.block_q;
    const int32_t last = r.q_offset + smaller((i + 1) * r.block_q, smaller(in.q_len[b], c.rows)) - 1;
    const int32_t n = candidates(in, c, b, i);
    int32_t *out = kept + ((size_t)list * c.q_blocks + i) * (1 + c.k_blocks);
    for (int32_t j = threadIdx.x; j < n; j += SELECT_THREADS) mass[j] = 0.0f;
    __syncthreads();
    const int32_t group = c.heads / c.lists;
    for (int32_t g = 0; g < group; ++g) add_mass(in, pooled, c, b, s * group + g, i, n, z, mass);
    for (int32_t j = threadIdx.x; j < n; j += SELECT_THREADS) {
        mass[j] /= (float)group;
        z[j] = (j < r.n_sink || (r.force_diag && j * r.block_k <= last && (j + 1) * r.block_k > first)) ? 1.0f : 0.0f;
    }
    __syncthreads();
    for (int32_t j = threadIdx.x; j < n; j += SELECT_THREADS) {  // forced first, then mass, then the smaller number
        int32_t ahead = 0;
        for (int32_t x = 0; x < n; ++x)
            ahead += z[x] != z[j] ? z[x] > z[j] : mass[x] != mass[j] ? mass[x] > mass[j] : x < j;
        order[ahead] = j;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int32_t must = 0, count = 0;
        for (int32_t j = 0; j < n; ++j) must += z[j] > 0.0f;
        const int32_t keep = how_many(c, mass, order, n, must, in.theta[s]);
        for (int32_t x = 0; x < n; ++x) z[order[x]] = x < keep ? 1.0f : 0.0f;
        for (int32_t j = 0; j < n; ++j)
            if (z[j] > 0.0f) out[1 + count++] = j;
        out[0] = count;
    }
}

// grid 1, threads SELECT_THREADS, shared 2 * SELECT_THREADS: blocks kept and blocks that were candidates, over all lists.
template <typename T>
__global__ void count_blocks(Operands<T> in, const int32_t *kept, int32_t *counted, Call c) {
    DSA_SHARED(shared);
    int32_t *sums = (int32_t *)shared, taken = 0, all = 0;
    for (int32_t x = threadIdx.x; x < c.batch * c.lists * c.q_blocks; x += SELECT_THREADS) {
        taken += kept[(size_t)x * (1 + c.k_blocks)];
        all += candidates(in, c, x / c.q_blocks / c.lists, x % c.q_blocks);
    }
    sums[2 * threadIdx.x] = taken, sums[2 * threadIdx.x + 1] = all;
    __syncthreads();
    if (threadIdx.x > 1) return;
    int32_t sum = 0;
    for (int32_t x = 0; x < SELECT_THREADS; ++x) sum += sums[2 * x + threadIdx.x];
    counted[threadIdx.x] = sum;
}

// grid (q_blocks, batch * heads), threads block_q, shared 2 * TILE * DIM. One query row a thread; tiles of keys and
// values in shared memory; softmax as it goes, over the listed blocks only. Writes every row of out.
template <typename T, int DIM>
__global__ void attend_blocks(Operands<T> in, const int32_t *kept, T *out, Call c) {
    DSA_SHARED(tile);
    float *k_tile = tile, *v_tile = tile + TILE * DIM;
    const Rules &r = c.rules;
    const int32_t i = blockIdx.x, b = blockIdx.y / c.heads, h = blockIdx.y % c.heads, t = i * r.block_q + threadIdx.x;
    const size_t keys_at = ((size_t)b * c.kv_heads + h * c.kv_heads / c.heads) * c.keys * DIM;
    const size_t at = ((size_t)blockIdx.y * c.rows + t) * DIM;
    const int32_t *list = kept + (((size_t)b * c.lists + h * c.lists / c.heads) * c.q_blocks + i) * (1 + c.k_blocks);
    const int32_t valid_k = smaller(in.kv_len[b], c.keys);
    const bool alive = t < smaller(in.q_len[b], c.rows);
    const float scale = r.scale != 0.0f ? r.scale : 1.0f / sqrtf((float)DIM);
    const float *bias = in.position_bias + (size_t)h * (2 * c.positions + 1) + c.positions;
    float q[DIM], sum[DIM], top = -3e38f, total = 0.0f;
#pragma unroll
    for (int d = 0; d < DIM; ++d) {
        q[d] = alive ? load(in.q + at + d) * scale : 0.0f;
        sum[d] = 0.0f;
    }
    for (int32_t x = 0; x < list[0]; ++x) {
        const int32_t end = smaller((list[1 + x] + 1) * r.block_k, valid_k);
        for (int32_t u0 = list[1 + x] * r.block_k; u0 < end; u0 += TILE) {
            const int32_t count = smaller(TILE, end - u0);
            __syncthreads();
            for (int32_t e = threadIdx.x; e < count * DIM; e += r.block_q) {
                k_tile[e] = load(in.k + keys_at + (size_t)u0 * DIM + e);
                v_tile[e] = load(in.v + keys_at + (size_t)u0 * DIM + e);
            }
            __syncthreads();
            for (int32_t y = 0; alive && y < count; ++y) {
                if (r.causal && u0 + y > r.q_offset + t) break;
                float s = 0.0f;
#pragma unroll
                for (int d = 0; d < DIM; ++d) s += q[d] * k_tile[y * DIM + d];
                if (c.positions) s += bias[larger(-c.positions, smaller(u0 + y - r.q_offset - t, c.positions))];
                if (s > top) {
                    const float shrink = expf(top - s);
                    total *= shrink;
#pragma unroll
                    for (int d = 0; d < DIM; ++d) sum[d] *= shrink;
                    top = s;
                }
                const float p = expf(s - top);
                total += p;
#pragma unroll
                for (int d = 0; d < DIM; ++d) sum[d] += p * v_tile[y * DIM + d];
            }
        }
    }
    if (t >= c.rows) return;
#pragma unroll
    for (int d = 0; d < DIM; ++d) store(out + at + d, total == 0.0f ? 0.0f : sum[d] / total);
}

inline size_t pooled_bytes(const Call &c) {
    const int32_t blocks = c.q_blocks > c.k_blocks ? c.q_blocks : c.k_blocks;
    return sizeof(float) * 2 * c.batch * c.heads * blocks * c.rank;
}

inline size_t kept_bytes(const Call &c) {
    return sizeof(int32_t) * c.batch * c.lists * c.q_blocks * (1 + c.k_blocks);
}

// Why this call cannot run; NULL if it can.
inline const char *why_not(const Call &c) {
    const Rules &r = c.rules;
    if (c.dim < 16 || c.dim > 128 || c.dim % 16) return "dim: 16 to 128, a multiple of 16";
    if (r.block_q < 16 || r.block_q > 128 || r.block_q % 16) return "block_q: 16 to 128, a multiple of 16";
    if (r.block_k < 16 || r.block_k > 128 || r.block_k % 16) return "block_k: 16 to 128, a multiple of 16";
    if (c.heads < 1 || c.kv_heads < 1 || c.heads % c.kv_heads) return "heads: a multiple of kv_heads";
    if (r.rule < THRESHOLD || r.rule > TOP_K) return "rule: 0, 1 or 2";
    if (3 * sizeof(float) * c.k_blocks > MOST_SHARED) return "keys: at most 4096 blocks";
    if ((long long)c.batch * c.heads > 65535) return "batch * heads: at most 65535";
    return NULL;
}

template <typename T>
inline void select(const Operands<T> &in, float *pooled, int32_t *kept, const Call &c, cudaStream_t stream) {
    const int32_t blocks = c.q_blocks > c.k_blocks ? c.q_blocks : c.k_blocks;
    DSA_LAUNCH(pool_project<T>, dsa_dim3(blocks, c.batch * c.heads, 2), dsa_dim3(c.dim), sizeof(float) * c.dim, stream,
               in, pooled, c);
    DSA_LAUNCH(select_blocks<T>, dsa_dim3(c.q_blocks, c.batch * c.lists), dsa_dim3(SELECT_THREADS),
               3 * sizeof(float) * c.k_blocks, stream, in, pooled, kept, c);
}

// counted: room for two numbers on the device.
template <typename T>
inline void count(const Operands<T> &in, const int32_t *kept, int32_t *counted, const Call &c, cudaStream_t stream) {
    DSA_LAUNCH(count_blocks<T>, dsa_dim3(1), dsa_dim3(SELECT_THREADS), 2 * sizeof(int32_t) * SELECT_THREADS, stream, in,
               kept, counted, c);
}

template <typename T, int DIM>
inline void attend_dim(const Operands<T> &in, const int32_t *kept, T *out, const Call &c, cudaStream_t stream) {
    auto kernel = attend_blocks<T, DIM>;
    DSA_LAUNCH(kernel, dsa_dim3(c.q_blocks, c.batch * c.heads), dsa_dim3(c.rules.block_q),
               2 * sizeof(float) * TILE * DIM, stream, in, kept, out, c);
}

template <typename T>
inline void attend(const Operands<T> &in, const int32_t *kept, T *out, const Call &c, cudaStream_t stream) {
    switch (c.dim) {
        case 16: return attend_dim<T, 16>(in, kept, out, c, stream);
        case 32: return attend_dim<T, 32>(in, kept, out, c, stream);
        case 48: return attend_dim<T, 48>(in, kept, out, c, stream);
        case 64: return attend_dim<T, 64>(in, kept, out, c, stream);
        case 80: return attend_dim<T, 80>(in, kept, out, c, stream);
        case 96: return attend_dim<T, 96>(in, kept, out, c, stream);
        case 112: return attend_dim<T, 112>(in, kept, out, c, stream);
        case 128: return attend_dim<T, 128>(in, kept, out, c, stream);
    }
}

}  // namespace edgeformer
