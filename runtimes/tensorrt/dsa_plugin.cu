// The operator as a plugin of TensorRT 8.2: node EdgeformerDSA, version 1. C++14, because that is what nvcc 10.2 has.
// Inputs q, k, v (fp32 or fp16, like the output), wq, wk, dist_bias, sink_bias, theta (fp32), q_len, kv_len (int32),
// position_bias (fp32; one column where there is none).
#include <NvInfer.h>

#include <atomic>
#include <cstring>
#include <new>
#include <string>

#include "dsa_kernels.cuh"

#define EDGEFORMER_API extern "C" __attribute__((visibility("default")))

enum { JOURNAL = 1024 };  // calls that are remembered: more layers than any model has
static std::atomic<long long> calls{0};

// On the device: what each of the last calls kept, of how many candidates. NULL where there was no memory for it.
static int32_t *journal() {
    static int32_t *const made = [] {
        void *memory = nullptr;
        return cudaMalloc(&memory, 2 * JOURNAL * sizeof(int32_t)) == cudaSuccess ? (int32_t *)memory : nullptr;
    }();
    return made;
}

// The proof of what ran: how often the plugin was enqueued in this process. A replayed CUDA graph is not counted.
EDGEFORMER_API int64_t edgeformer_dsa_calls() { return calls.load(); }
EDGEFORMER_API void edgeformer_dsa_reset() { calls = 0; }

// Pairs of kept and candidate blocks of the last calls (at most `most`), oldest first; returns how many. The stream has
// ended when the caller asks.
EDGEFORMER_API int32_t edgeformer_dsa_kept(int32_t most, int64_t *pairs) {
    const long long made = calls;
    int32_t n = most < JOURNAL ? most : JOURNAL, found[2];
    if (made < n) n = (int32_t)made;
    for (int32_t i = 0; i < n; ++i) {
        const int32_t *from = journal() ? journal() + (made - n + i) % JOURNAL * 2 : nullptr;
        if (!from || cudaMemcpy(found, from, sizeof found, cudaMemcpyDeviceToHost) != cudaSuccess) return 0;
        pairs[2 * i] = found[0], pairs[2 * i + 1] = found[1];
    }
    return n;
}
EDGEFORMER_API const char *edgeformer_dsa_kernels() { return "cuda"; }

namespace edgeformer {

using namespace nvinfer1;

enum { Q, K, V, WQ, WK, DIST_BIAS, SINK_BIAS, THETA, Q_LEN, KV_LEN, POSITION_BIAS, INPUTS };

static const Rules kDefaults = {64, 64, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0.0f};

struct Attribute {
    const char *name;
    int32_t Rules::*place;
};
static const Attribute kAttributes[] = {
    {"block_q", &Rules::block_q},       {"block_k", &Rules::block_k},       {"rule", &Rules::rule},
    {"min_blocks", &Rules::min_blocks}, {"max_blocks", &Rules::max_blocks}, {"force_diag", &Rules::force_diag},
    {"n_sink", &Rules::n_sink},         {"causal", &Rules::causal},         {"q_offset", &Rules::q_offset},
    {"select_per_kv", &Rules::select_per_kv}, {"dense_below", &Rules::dense_below},
};
enum { ATTRIBUTES = sizeof(kAttributes) / sizeof(kAttributes[0]) };

static bool is_length(int32_t at) { return at == Q_LEN || at == KV_LEN; }

static Call call_of(const Rules &rules, const PluginTensorDesc *in) {
    const Dims &q = in[Q].dims, &k = in[K].dims;
    Call c;
    c.rules = rules;
    c.batch = q.d[0], c.heads = q.d[1], c.rows = q.d[2], c.dim = q.d[3];
    c.kv_heads = k.d[1], c.keys = k.d[2];
    c.rank = in[WQ].dims.d[2];
    c.reach = in[DIST_BIAS].dims.d[1] / 2;
    c.sinks = in[SINK_BIAS].dims.d[1];
    c.positions = in[POSITION_BIAS].dims.d[1] / 2;
    c.q_blocks = (c.rows + rules.block_q - 1) / rules.block_q;
    c.k_blocks = (c.keys + rules.block_k - 1) / rules.block_k;
    c.lists = rules.select_per_kv ? c.kv_heads : c.heads;
    return c;
}

template <typename T>
static Operands<T> operands_of(const void *const *x) {
    Operands<T> in;
    in.q = static_cast<const T *>(x[Q]);
    in.k = static_cast<const T *>(x[K]);
    in.v = static_cast<const T *>(x[V]);
    in.wq = static_cast<const float *>(x[WQ]);
    in.wk = static_cast<const float *>(x[WK]);
    in.dist_bias = static_cast<const float *>(x[DIST_BIAS]);
    in.sink_bias = static_cast<const float *>(x[SINK_BIAS]);
    in.theta = static_cast<const float *>(x[THETA]);
    in.q_len = static_cast<const int32_t *>(x[Q_LEN]);
    in.kv_len = static_cast<const int32_t *>(x[KV_LEN]);
    in.position_bias = static_cast<const float *>(x[POSITION_BIAS]);
    return in;
}

class Plugin : public IPluginV2DynamicExt {
   public:
    explicit Plugin(const Rules &rules) : rules_(rules) {}

    IPluginV2DynamicExt *clone() const noexcept override {
        Plugin *made = new (std::nothrow) Plugin(rules_);
        if (made) made->setPluginNamespace(space_.c_str());
        return made;
    }
    DimsExprs getOutputDimensions(int32_t, const DimsExprs *in, int32_t, IExprBuilder &) noexcept override {
        return in[Q];
    }
    bool supportsFormatCombination(int32_t at, const PluginTensorDesc *x, int32_t inputs, int32_t) noexcept override {
        if (inputs != INPUTS || x[at].format != TensorFormat::kLINEAR) return false;
        if (at == Q) return x[Q].type == DataType::kFLOAT || x[Q].type == DataType::kHALF;
        if (at == K || at == V || at == INPUTS) return x[at].type == x[Q].type;
        return x[at].type == (is_length(at) ? DataType::kINT32 : DataType::kFLOAT);  // selection is fp32 everywhere
    }
    void configurePlugin(const DynamicPluginTensorDesc *, int32_t, const DynamicPluginTensorDesc *,
                         int32_t) noexcept override {}
    size_t getWorkspaceSize(const PluginTensorDesc *in, int32_t, const PluginTensorDesc *,
                            int32_t) const noexcept override {
        const Call c = call_of(rules_, in);
        return pooled_bytes(c) + kept_bytes(c);
    }
    int32_t enqueue(const PluginTensorDesc *in, const PluginTensorDesc *, const void *const *x, void *const *y,
                    void *workspace, cudaStream_t stream) noexcept override {
        const Call c = call_of(rules_, in);
        if (why_not(c)) return 1;
        const long long call = calls++;
        return in[Q].type == DataType::kHALF ? run<dsa_half>(c, call, x, y, workspace, stream)
                                             : run<float>(c, call, x, y, workspace, stream);
    }
    DataType getOutputDataType(int32_t, const DataType *types, int32_t) const noexcept override { return types[Q]; }
    const char *getPluginType() const noexcept override { return "EdgeformerDSA"; }
    const char *getPluginVersion() const noexcept override { return "1"; }
    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    size_t getSerializationSize() const noexcept override { return sizeof(Rules); }
    void serialize(void *to) const noexcept override { std::memcpy(to, &rules_, sizeof(Rules)); }
    void destroy() noexcept override { delete this; }
    void setPluginNamespace(const char *space) noexcept override { space_ = space; }
    const char *getPluginNamespace() const noexcept override { return space_.c_str(); }

   private:
    template <typename T>
    static int32_t run(const Call &c, long long call, const void *const *x, void *const *y, void *workspace, cudaStream_t stream) {
        const Operands<T> in = operands_of<T>(x);
        float *pooled = static_cast<float *>(workspace);
        int32_t *kept = reinterpret_cast<int32_t *>(static_cast<char *>(workspace) + pooled_bytes(c));
        select(in, pooled, kept, c, stream);
        if (journal()) count(in, kept, journal() + call % JOURNAL * 2, c, stream);
        attend(in, kept, static_cast<T *>(y[0]), c, stream);
        return cudaGetLastError() == cudaSuccess ? 0 : 1;
    }

    Rules rules_;
    std::string space_;
};

class Creator : public IPluginCreator {
   public:
    Creator() {
        for (int32_t i = 0; i < ATTRIBUTES; ++i)
            fields_[i] = PluginField(kAttributes[i].name, nullptr, PluginFieldType::kINT32, 1);
        fields_[ATTRIBUTES] = PluginField("scale", nullptr, PluginFieldType::kFLOAT32, 1);
        collection_.nbFields = ATTRIBUTES + 1;
        collection_.fields = fields_;
    }
    const char *getPluginName() const noexcept override { return "EdgeformerDSA"; }
    const char *getPluginVersion() const noexcept override { return "1"; }
    const PluginFieldCollection *getFieldNames() noexcept override { return &collection_; }
    IPluginV2 *createPlugin(const char *, const PluginFieldCollection *given) noexcept override {
        Rules rules = kDefaults;
        for (int32_t i = 0; i < given->nbFields; ++i) {
            const PluginField &field = given->fields[i];
            if (!field.data || field.length < 1) continue;
            for (const Attribute &known : kAttributes)
                if (!std::strcmp(field.name, known.name)) rules.*known.place = *static_cast<const int32_t *>(field.data);
            if (!std::strcmp(field.name, "scale")) rules.scale = *static_cast<const float *>(field.data);
        }
        return new (std::nothrow) Plugin(rules);
    }
    IPluginV2 *deserializePlugin(const char *, const void *data, size_t bytes) noexcept override {
        if (bytes != sizeof(Rules)) return nullptr;
        Rules rules;
        std::memcpy(&rules, data, bytes);
        return new (std::nothrow) Plugin(rules);
    }
    void setPluginNamespace(const char *space) noexcept override { space_ = space; }
    const char *getPluginNamespace() const noexcept override { return space_.c_str(); }

   private:
    PluginField fields_[ATTRIBUTES + 1];
    PluginFieldCollection collection_;
    std::string space_;
};

// Known to the parser from the moment this library is loaded.
static struct Registered {
    Creator creator;
    Registered() { getPluginRegistry()->registerCreator(creator, ""); }
} registered;

}  // namespace edgeformer
