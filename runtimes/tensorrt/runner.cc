// TensorRT 8.2 behind a C interface: build an engine from ONNX, open it, run rows, close. The agent loads it with ctypes.
// A function that can fail returns 0 or NULL and leaves its reason in `error` (`bytes` long, always terminated).
#include <NvInfer.h>
#include <NvOnnxParser.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

#define EDGEFORMER_API extern "C" __attribute__((visibility("default")))

namespace {

const size_t kWorkspace = 256u << 20;  // of 4 GB that the GPU shares with everything else

struct Log : ILogger {
    std::string last;
    void log(Severity severity, const char *message) noexcept override {
        if (severity <= Severity::kERROR) last = message;
    }
};

struct Error {
    char *text;
    int32_t bytes;
    int32_t operator()(const std::string &what, const std::string &why) const {
        std::snprintf(text, bytes, "%s: %s", what.c_str(), why.empty() ? "no reason given" : why.c_str());
        return 0;
    }
};

bool parse_dims(const std::string &text, Dims *dims) {
    std::istringstream numbers(text);
    std::string number;
    dims->nbDims = 0;
    while (std::getline(numbers, number, 'x')) {
        if (dims->nbDims == Dims::MAX_DIMS || number.empty()) return false;
        dims->d[dims->nbDims++] = std::atoi(number.c_str());
    }
    return dims->nbDims > 0;
}

// build.txt, as far as one ONNX file of the program needs it.
struct Plan {
    bool half = false;
    std::set<std::string> exact;  // nodes that stay fp32
    std::vector<std::string> inputs;
    std::vector<Dims> sizes;  // least, usual, most for each input
};

bool read_plan(const char *text, const std::string &file, Plan *plan) {
    std::istringstream lines(text);
    std::string line;
    while (std::getline(lines, line)) {
        std::istringstream words(line);
        std::string word, name, more[3];
        words >> word >> name >> more[0] >> more[1] >> more[2];
        if (word == "precision") {
            plan->half = name == "fp16";
        } else if (word == "fp32") {
            if (name == file) plan->exact.insert(more[0]);
        } else if (word == "input") {
            plan->inputs.push_back(name);
            for (const std::string &size : more) {
                plan->sizes.push_back(Dims());
                if (!parse_dims(size, &plan->sizes.back())) return false;
            }
        } else if (!word.empty()) {
            return false;
        }
    }
    return !plan->inputs.empty();
}

// A layer is called like its node; a node that became several has a suffix after the name.
bool stays_exact(const std::set<std::string> &exact, const std::string &layer) {
    if (exact.count(layer)) return true;
    const size_t end = layer.find_last_of('_');
    return end != std::string::npos && exact.count(layer.substr(0, end));
}

void keep_exact(INetworkDefinition *network, const Plan &plan) {
    for (int32_t i = 0; i < network->getNbLayers(); ++i) {
        ILayer *layer = network->getLayer(i);
        bool floats = layer->getNbOutputs() > 0 && stays_exact(plan.exact, layer->getName());
        for (int32_t j = 0; floats && j < layer->getNbOutputs(); ++j) {
            const ITensor *out = layer->getOutput(j);
            floats = out->getType() == DataType::kFLOAT && !out->isShapeTensor();
        }
        if (!floats) continue;
        layer->setPrecision(DataType::kFLOAT);
        for (int32_t j = 0; j < layer->getNbOutputs(); ++j) layer->setOutputType(j, DataType::kFLOAT);
    }
}

bool set_profile(IOptimizationProfile *profile, const Plan &plan) {
    const OptProfileSelector which[] = {OptProfileSelector::kMIN, OptProfileSelector::kOPT, OptProfileSelector::kMAX};
    bool good = profile != nullptr;
    for (size_t i = 0; good && i < plan.sizes.size(); ++i)
        good = profile->setDimensions(plan.inputs[i / 3].c_str(), which[i % 3], plan.sizes[i]);
    return good && profile->isValid();
}

struct Session {
    Log log;
    std::unique_ptr<IRuntime> runtime;
    std::unique_ptr<ICudaEngine> engine;
    std::unique_ptr<IExecutionContext> context;  // goes before the engine, the engine before the runtime
    cudaStream_t stream = nullptr;
    std::vector<void *> buffers;
    std::vector<size_t> sizes;
    ~Session() {
        for (void *buffer : buffers) cudaFree(buffer);
        if (stream) cudaStreamDestroy(stream);
        context.reset(), engine.reset(), runtime.reset();
    }
    // Device memory of at least `bytes` for a binding; it only grows.
    bool room(int32_t binding, size_t bytes) {
        if (bytes <= sizes[binding]) return true;
        cudaFree(buffers[binding]);
        buffers[binding] = nullptr, sizes[binding] = 0;
        if (cudaMalloc(&buffers[binding], bytes) != cudaSuccess) return false;
        sizes[binding] = bytes;
        return true;
    }
};

size_t bytes_of(const Dims &dims, DataType type) {
    size_t count = type == DataType::kHALF ? 2 : 4;
    for (int32_t i = 0; i < dims.nbDims; ++i) count *= dims.d[i];
    return count;
}

}  // namespace

EDGEFORMER_API int32_t edgeformer_trt_version() { return getInferLibVersion(); }

// Builds the engine of one ONNX file (`name` is what the plan calls it) and writes it to `engine`. Takes minutes.
EDGEFORMER_API int32_t edgeformer_trt_build(const char *onnx, const char *name, const char *plan_text,
                                            const char *engine, char *error, int32_t bytes) {
    const Error fail = {error, bytes};
    Plan plan;
    if (!read_plan(plan_text, name, &plan)) return fail("build.txt", "not of this runner's form");
    Log log;
    std::unique_ptr<IBuilder> builder(createInferBuilder(log));
    if (!builder) return fail("TensorRT has no builder", log.last);
    const uint32_t batch = 1u << static_cast<uint32_t>(NetworkDefinitionCreationFlag::kEXPLICIT_BATCH);
    std::unique_ptr<INetworkDefinition> network(builder->createNetworkV2(batch));
    if (!network) return fail("TensorRT has no network", log.last);
    std::unique_ptr<nvonnxparser::IParser> parser(nvonnxparser::createParser(*network, log));
    if (!parser) return fail("TensorRT has no ONNX parser", log.last);
    if (!parser->parseFromFile(onnx, static_cast<int>(ILogger::Severity::kERROR))) {
        const nvonnxparser::IParserError *first = parser->getNbErrors() ? parser->getError(0) : nullptr;
        return fail(name, first ? "node " + std::to_string(first->node()) + ": " + first->desc() : log.last);
    }
    std::unique_ptr<IBuilderConfig> config(builder->createBuilderConfig());
    if (!config) return fail("TensorRT has no configuration", log.last);
    config->setMaxWorkspaceSize(kWorkspace);
    if (plan.half) {
        config->setFlag(BuilderFlag::kFP16);
        config->setFlag(BuilderFlag::kOBEY_PRECISION_CONSTRAINTS);
        keep_exact(network.get(), plan);
    }
    IOptimizationProfile *profile = builder->createOptimizationProfile();
    if (!set_profile(profile, plan)) return fail("the inputs' sizes in build.txt", log.last);
    if (config->addOptimizationProfile(profile) < 0) return fail("the optimization profile", log.last);
    std::unique_ptr<IHostMemory> made(builder->buildSerializedNetwork(*network, *config));
    if (!made) return fail("building the engine", log.last);
    std::ofstream file(engine, std::ios::binary);
    file.write(static_cast<const char *>(made->data()), made->size());
    file.close();
    return file ? 1 : fail(engine, "cannot be written");
}

EDGEFORMER_API void edgeformer_trt_close(void *session) { delete static_cast<Session *>(session); }

EDGEFORMER_API void *edgeformer_trt_open(const char *engine, char *error, int32_t bytes) {
    const Error fail = {error, bytes};
    std::ifstream file(engine, std::ios::binary);
    const std::string data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (data.empty()) return fail(engine, "missing or empty"), nullptr;
    std::unique_ptr<Session> made(new Session);
    made->runtime.reset(createInferRuntime(made->log));
    if (made->runtime) made->engine.reset(made->runtime->deserializeCudaEngine(data.data(), data.size()));
    if (made->engine) made->context.reset(made->engine->createExecutionContext());
    if (!made->context) return fail(engine, made->log.last), nullptr;
    if (cudaStreamCreate(&made->stream) != cudaSuccess) return fail("CUDA stream", "none to be had"), nullptr;
    made->buffers.assign(made->engine->getNbBindings(), nullptr);
    made->sizes.assign(made->engine->getNbBindings(), 0);
    return made.release();
}

// Runs one batch. `shapes`: the axes' number, then their sizes, for each input; the same form comes back for the output.
// `out` has room for `capacity` bytes of fp32. Inputs have the dtype that the engine says (fp32 or int32).
EDGEFORMER_API int32_t edgeformer_trt_run(void *session, int32_t inputs, const char *const *names,
                                          const int32_t *shapes, const void *const *data, const char *output,
                                          float *out, int64_t capacity, int32_t *out_shape, char *error,
                                          int32_t bytes) {
    const Error fail = {error, bytes};
    Session &s = *static_cast<Session *>(session);
    for (int32_t i = 0; i < inputs; ++i) {
        const int32_t at = s.engine->getBindingIndex(names[i]);
        if (at < 0 || !s.engine->bindingIsInput(at)) return fail(names[i], "no input of this engine");
        Dims dims;
        dims.nbDims = *shapes++;
        if (dims.nbDims < 0 || dims.nbDims > Dims::MAX_DIMS) return fail(names[i], "too many axes");
        for (int32_t d = 0; d < dims.nbDims; ++d) dims.d[d] = *shapes++;
        if (!s.context->setBindingDimensions(at, dims)) return fail(names[i], "outside the engine's sizes");
        const size_t size = bytes_of(dims, s.engine->getBindingDataType(at));
        if (!s.room(at, size)) return fail(names[i], "no GPU memory");
        if (cudaMemcpyAsync(s.buffers[at], data[i], size, cudaMemcpyHostToDevice, s.stream) != cudaSuccess)
            return fail(names[i], cudaGetErrorString(cudaGetLastError()));
    }
    const int32_t at = s.engine->getBindingIndex(output);
    if (at < 0 || s.engine->bindingIsInput(at)) return fail(output, "no output of this engine");
    if (s.engine->getBindingDataType(at) != DataType::kFLOAT) return fail(output, "not fp32");
    if (!s.context->allInputDimensionsSpecified()) return fail("inputs", "one is missing");
    const Dims dims = s.context->getBindingDimensions(at);
    const size_t size = bytes_of(dims, DataType::kFLOAT);
    if (size > static_cast<size_t>(capacity)) return fail(output, "larger than the caller's room");
    if (!s.room(at, size)) return fail(output, "no GPU memory");
    if (!s.context->enqueueV2(s.buffers.data(), s.stream, nullptr)) return fail("enqueue", s.log.last);
    cudaMemcpyAsync(out, s.buffers[at], size, cudaMemcpyDeviceToHost, s.stream);
    if (cudaStreamSynchronize(s.stream) != cudaSuccess)
        return fail("the engine", cudaGetErrorString(cudaGetLastError()));
    *out_shape++ = dims.nbDims;
    for (int32_t d = 0; d < dims.nbDims; ++d) *out_shape++ = dims.d[d];
    return 1;
}
