// A host for the plugin: a registry, then the life of a plugin as TensorRT leads it, over memory of this machine.
#include "dsa_plugin.cu"

#include <vector>

using namespace edgeformer;

struct Registry : IPluginRegistry {
    IPluginCreator *creator = nullptr;
    bool registerCreator(IPluginCreator &given, const char *) noexcept override { return creator = &given, true; }
    IPluginCreator *getPluginCreator(const char *type, const char *version, const char *) noexcept override {
        const bool same = creator && !std::strcmp(type, creator->getPluginName()) &&
                          !std::strcmp(version, creator->getPluginVersion());
        return same ? creator : nullptr;
    }
};
extern "C" IPluginRegistry *getPluginRegistry() noexcept {
    static Registry registry;
    return &registry;
}

struct Number : IDimensionExpr {
    int32_t value;
    int32_t getConstantValue() const noexcept override { return value; }
};
struct Builder : IExprBuilder {
    const IDimensionExpr *constant(int32_t) noexcept override { return nullptr; }
};

// As the parser does it: every field the creator names, from the node's attributes (ints, in that order, then scale).
static IPluginV2DynamicExt *made(const int32_t *attributes, float scale) {
    IPluginCreator *creator = getPluginRegistry()->getPluginCreator("EdgeformerDSA", "1", "");
    if (!creator) return nullptr;
    std::vector<PluginField> fields;
    const PluginFieldCollection *names = creator->getFieldNames();
    for (int32_t i = 0; i < names->nbFields; ++i) {
        const bool real = names->fields[i].type == PluginFieldType::kFLOAT32;
        const void *value = real ? (const void *)&scale : attributes + i;
        fields.push_back(PluginField(names->fields[i].name, value, names->fields[i].type, 1));
    }
    const PluginFieldCollection given = {(int32_t)fields.size(), fields.data()};
    IPluginV2 *first = creator->createPlugin("node", &given);
    IPluginV2DynamicExt *copy = static_cast<IPluginV2DynamicExt *>(first)->clone();
    first->destroy();
    std::vector<char> bytes(copy->getSerializationSize());
    copy->serialize(bytes.data());
    copy->destroy();
    if (creator->deserializePlugin("node", bytes.data(), bytes.size() - 1)) return nullptr;  // a cut engine
    return static_cast<IPluginV2DynamicExt *>(creator->deserializePlugin("node", bytes.data(), bytes.size()));
}

static bool formats_are_ours(IPluginV2DynamicExt *plugin, std::vector<PluginTensorDesc> x) {
    for (int32_t at = 0; at <= INPUTS; ++at) {
        if (!plugin->supportsFormatCombination(at, x.data(), INPUTS, 1)) return false;
        const PluginTensorDesc kept = x[at];
        x[at].format = TensorFormat::kCHW2;
        if (plugin->supportsFormatCombination(at, x.data(), INPUTS, 1)) return false;
        x[at] = kept, x[at].type = DataType::kINT8;
        if (plugin->supportsFormatCombination(at, x.data(), INPUTS, 1)) return false;
        x[at] = kept;
    }
    x[THETA].type = DataType::kHALF;  // a rounded threshold would keep other blocks
    return !plugin->supportsFormatCombination(THETA, x.data(), INPUTS, 1);
}

static bool output_is_like_q(IPluginV2DynamicExt *plugin, const Dims &q) {
    Number numbers[4];
    DimsExprs in[INPUTS] = {};
    in[Q].nbDims = 4;
    for (int32_t i = 0; i < 4; ++i) numbers[i].value = q.d[i], in[Q].d[i] = &numbers[i];
    Builder builder;
    const DimsExprs out = plugin->getOutputDimensions(0, in, INPUTS, builder);
    bool same = out.nbDims == 4;
    for (int32_t i = 0; i < 4; ++i) same &= out.d[i]->getConstantValue() == q.d[i];
    return same;
}

// shapes: rank, then sizes, for each of the inputs. kept receives the lists as they lie in the workspace.
// Returns 0, or the step that failed.
extern "C" int32_t test_plugin(const int32_t *attributes, float scale, int32_t half, const int32_t *shapes,
                               const void *const *x, void *y, int32_t *kept) {
    IPluginV2DynamicExt *plugin = made(attributes, scale);
    if (!plugin) return 10;
    std::vector<PluginTensorDesc> all(INPUTS + 1);
    for (int32_t i = 0; i < INPUTS; ++i) {
        all[i].dims.nbDims = *shapes++;
        for (int32_t d = 0; d < all[i].dims.nbDims; ++d) all[i].dims.d[d] = *shapes++;
        all[i].type = is_length(i) ? DataType::kINT32 : i <= V && half ? DataType::kHALF : DataType::kFLOAT;
        all[i].format = TensorFormat::kLINEAR, all[i].scale = 1.0f;
    }
    all[INPUTS] = all[Q];
    if (!formats_are_ours(plugin, all)) return 11;
    if (!output_is_like_q(plugin, all[Q].dims)) return 12;
    const DataType types[] = {all[Q].type};
    if (plugin->getOutputDataType(0, types, INPUTS) != all[Q].type || plugin->getNbOutputs() != 1) return 13;
    const Call call = call_of(Rules{attributes[0], attributes[1], attributes[2], attributes[3], attributes[4],
                                    attributes[5], attributes[6], attributes[7], attributes[8], attributes[9],
                                    attributes[10], scale},
                              all.data());
    const size_t bytes = plugin->getWorkspaceSize(all.data(), INPUTS, &all[INPUTS], 1);
    if (bytes != pooled_bytes(call) + kept_bytes(call)) return 14;
    std::vector<char> workspace(bytes);
    void *out[] = {y};
    if (plugin->initialize()) return 15;
    const int32_t status = plugin->enqueue(all.data(), &all[INPUTS], x, out, workspace.data(), nullptr);
    if (!status && kept) std::memcpy(kept, workspace.data() + pooled_bytes(call), kept_bytes(call));
    plugin->terminate();
    plugin->destroy();
    return status;
}

// Attention over given lists, laid out as `select_blocks` writes them.
extern "C" int32_t test_attend(const int32_t *attributes, float scale, int32_t half, const int32_t *shapes,
                               const void *const *x, void *y, const int32_t *kept) {
    std::vector<PluginTensorDesc> all(INPUTS);
    for (PluginTensorDesc &one : all) {
        one.dims.nbDims = *shapes++;
        for (int32_t d = 0; d < one.dims.nbDims; ++d) one.dims.d[d] = *shapes++;
    }
    Rules rules = kDefaults;
    for (int32_t i = 0; i < ATTRIBUTES; ++i) rules.*kAttributes[i].place = attributes[i];
    rules.scale = scale;
    const Call call = call_of(rules, all.data());
    if (why_not(call)) return 1;
    if (half)
        attend(operands_of<dsa_half>(x), kept, static_cast<dsa_half *>(y), call, nullptr);
    else
        attend(operands_of<float>(x), kept, static_cast<float *>(y), call, nullptr);
    return 0;
}

extern "C" uint16_t test_to_half(float x) { return __float2half(x).bits; }
extern "C" float test_from_half(uint16_t bits) { return __half2float(dsa_half{bits}); }
