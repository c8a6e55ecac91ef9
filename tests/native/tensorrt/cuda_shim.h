// CUDA as far as our kernels use it, on one CPU thread: every CUDA thread of a block is a context of its own, a barrier
// hands over to the next one. Shared memory starts poisoned. No warps, no atomics, no concurrency between blocks.
#pragma once
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__
#define __device__

struct dsa_dim3 {
    int32_t x, y, z;
    explicit dsa_dim3(int32_t a = 1, int32_t b = 1, int32_t c = 1) : x(a), y(b), z(c) {}
};

// IEEE half precision by hand: compilers differ in what they offer.
struct dsa_half {
    uint16_t bits;
};

inline float __half2float(dsa_half h) {
    const uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, rest = h.bits & 1023;
    float value;
    uint32_t word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | rest << 13;
    if (!exponent) {
        value = (float)rest * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    memcpy(&value, &word, 4);
    return value;
}

inline dsa_half __float2half(float x) {  // to nearest, ties to even
    uint32_t word;
    memcpy(&word, &x, 4);
    const uint32_t sign = word >> 16 & 0x8000;
    const float size = fabsf(x);
    if (x != x) return dsa_half{(uint16_t)(sign | 0x7e00)};
    if (size >= 65520.0f) return dsa_half{(uint16_t)(sign | 0x7c00)};
    if (size < 6.103515625e-5f) return dsa_half{(uint16_t)(sign | (uint32_t)rintf(size * 16777216.0f))};
    word &= 0x7fffffff;
    word += 0xfff + (word >> 13 & 1);
    return dsa_half{(uint16_t)(sign | ((word >> 13) - (112u << 10)))};
}

namespace shim {
struct Context {
    ucontext_t state;
    std::vector<char> stack;
    bool done;
};
struct Block {
    dsa_dim3 thread, block, threads;
    std::vector<float> shared;
    std::vector<Context> contexts;
    ucontext_t scheduler;
    size_t current;
    std::function<void()> body;
};
inline Block &now() {
    static Block block;
    return block;
}
inline void enter() {
    now().body();
    now().contexts[now().current].done = true;
    swapcontext(&now().contexts[now().current].state, &now().scheduler);
}
inline void barrier() { swapcontext(&now().contexts[now().current].state, &now().scheduler); }
inline void run_block(size_t bytes) {
    Block &b = now();
    b.shared.assign(bytes / sizeof(float), NAN);
    for (Context &c : b.contexts) {
        c.stack.resize(1 << 16);
        c.done = false;
        getcontext(&c.state);
        c.state.uc_stack.ss_sp = c.stack.data();
        c.state.uc_stack.ss_size = c.stack.size();
        c.state.uc_link = nullptr;
        makecontext(&c.state, enter, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (b.current = 0; b.current < b.contexts.size(); ++b.current) {
            if (b.contexts[b.current].done) continue;
            b.thread = dsa_dim3((int32_t)b.current, 0, 0);
            swapcontext(&b.scheduler, &b.contexts[b.current].state);
            alive |= !b.contexts[b.current].done;
        }
    }
}
inline void launch(dsa_dim3 grid, dsa_dim3 threads, size_t bytes, std::function<void()> body) {
    Block &b = now();
    b.threads = threads, b.body = body;
    b.contexts.resize(threads.x);
    for (int32_t z = 0; z < grid.z; ++z)
        for (int32_t y = 0; y < grid.y; ++y)
            for (int32_t x = 0; x < grid.x; ++x) {
                b.block = dsa_dim3(x, y, z);
                run_block(bytes);
            }
}
}  // namespace shim

#define threadIdx (shim::now().thread)
#define blockIdx (shim::now().block)
#define __syncthreads() shim::barrier()
#define DSA_SHARED(name) float *name = shim::now().shared.data()
#define DSA_LAUNCH(kernel, grid, threads, bytes, stream, ...) \
    ((void)(stream), shim::launch(grid, threads, bytes, [=] { kernel(__VA_ARGS__); }))
