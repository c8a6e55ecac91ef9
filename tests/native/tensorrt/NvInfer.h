// The declarations of TensorRT 8.2 that our sources use, written down from its documentation. For tests only: names and
// signatures are the real ones, the order of members is not, so nothing built with this file can meet the real library.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4 };
enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1 };

struct Dims {
    enum { MAX_DIMS = 8 };
    int32_t nbDims, d[MAX_DIMS];
};

struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};
struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min, max;
};

class IDimensionExpr {
   public:
    virtual int32_t getConstantValue() const noexcept = 0;
};
struct DimsExprs {
    int32_t nbDims;
    const IDimensionExpr *d[Dims::MAX_DIMS];
};
class IExprBuilder {
   public:
    virtual const IDimensionExpr *constant(int32_t value) noexcept = 0;
};

class IPluginV2 {
   public:
    virtual const char *getPluginType() const noexcept = 0;
    virtual const char *getPluginVersion() const noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual int32_t initialize() noexcept = 0;
    virtual void terminate() noexcept = 0;
    virtual size_t getSerializationSize() const noexcept = 0;
    virtual void serialize(void *buffer) const noexcept = 0;
    virtual void destroy() noexcept = 0;
    virtual void setPluginNamespace(const char *space) noexcept = 0;
    virtual const char *getPluginNamespace() const noexcept = 0;

   protected:
    virtual ~IPluginV2() noexcept = default;
};

class IPluginV2DynamicExt : public IPluginV2 {
   public:
    virtual IPluginV2DynamicExt *clone() const noexcept = 0;
    virtual DataType getOutputDataType(int32_t index, const DataType *types, int32_t inputs) const noexcept = 0;
    virtual DimsExprs getOutputDimensions(int32_t index, const DimsExprs *in, int32_t inputs,
                                          IExprBuilder &builder) noexcept = 0;
    virtual bool supportsFormatCombination(int32_t at, const PluginTensorDesc *x, int32_t inputs,
                                           int32_t outputs) noexcept = 0;
    virtual void configurePlugin(const DynamicPluginTensorDesc *in, int32_t inputs, const DynamicPluginTensorDesc *out,
                                 int32_t outputs) noexcept = 0;
    virtual size_t getWorkspaceSize(const PluginTensorDesc *in, int32_t inputs, const PluginTensorDesc *out,
                                    int32_t outputs) const noexcept = 0;
    virtual int32_t enqueue(const PluginTensorDesc *in, const PluginTensorDesc *out, const void *const *x,
                            void *const *y, void *workspace, cudaStream_t stream) noexcept = 0;
};

enum class PluginFieldType : int32_t { kFLOAT16 = 0, kFLOAT32 = 1, kFLOAT64 = 2, kINT8 = 3, kINT16 = 4, kINT32 = 5 };
struct PluginField {
    const char *name;
    const void *data;
    PluginFieldType type;
    int32_t length;
    PluginField(const char *n = nullptr, const void *p = nullptr, PluginFieldType t = PluginFieldType::kINT32,
                int32_t count = 0)
        : name(n), data(p), type(t), length(count) {}
};
struct PluginFieldCollection {
    int32_t nbFields;
    const PluginField *fields;
};

class IPluginCreator {
   public:
    virtual const char *getPluginName() const noexcept = 0;
    virtual const char *getPluginVersion() const noexcept = 0;
    virtual const PluginFieldCollection *getFieldNames() noexcept = 0;
    virtual IPluginV2 *createPlugin(const char *name, const PluginFieldCollection *fields) noexcept = 0;
    virtual IPluginV2 *deserializePlugin(const char *name, const void *data, size_t bytes) noexcept = 0;
    virtual void setPluginNamespace(const char *space) noexcept = 0;
    virtual const char *getPluginNamespace() const noexcept = 0;
    virtual ~IPluginCreator() = default;
};
class IPluginRegistry {
   public:
    virtual bool registerCreator(IPluginCreator &creator, const char *space) noexcept = 0;
    virtual IPluginCreator *getPluginCreator(const char *type, const char *version, const char *space) noexcept = 0;
};

class ILogger {
   public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, const char *message) noexcept = 0;
    virtual ~ILogger() = default;
};

class ITensor {
   public:
    virtual ~ITensor() noexcept = default;
    virtual DataType getType() const noexcept = 0;
    virtual bool isShapeTensor() const noexcept = 0;
};
class ILayer {
   public:
    virtual ~ILayer() noexcept = default;
    virtual const char *getName() const noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual ITensor *getOutput(int32_t index) const noexcept = 0;
    virtual void setPrecision(DataType type) noexcept = 0;
    virtual void setOutputType(int32_t index, DataType type) noexcept = 0;
};
enum class NetworkDefinitionCreationFlag : int32_t { kEXPLICIT_BATCH = 0 };
class INetworkDefinition {
   public:
    virtual ~INetworkDefinition() noexcept = default;
    virtual int32_t getNbLayers() const noexcept = 0;
    virtual ILayer *getLayer(int32_t index) const noexcept = 0;
};
enum class OptProfileSelector : int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
class IOptimizationProfile {
   public:
    virtual bool setDimensions(const char *input, OptProfileSelector select, Dims dims) noexcept = 0;
    virtual bool isValid() const noexcept = 0;

   protected:
    virtual ~IOptimizationProfile() noexcept = default;
};
enum class BuilderFlag : int32_t { kFP16 = 0, kOBEY_PRECISION_CONSTRAINTS = 9 };
class IBuilderConfig {
   public:
    virtual ~IBuilderConfig() noexcept = default;
    virtual void setMaxWorkspaceSize(size_t bytes) noexcept = 0;
    virtual void setFlag(BuilderFlag flag) noexcept = 0;
    virtual int32_t addOptimizationProfile(const IOptimizationProfile *profile) noexcept = 0;
};
class IHostMemory {
   public:
    virtual ~IHostMemory() noexcept = default;
    virtual void *data() const noexcept = 0;
    virtual size_t size() const noexcept = 0;
};
class IBuilder {
   public:
    virtual ~IBuilder() noexcept = default;
    virtual INetworkDefinition *createNetworkV2(uint32_t flags) noexcept = 0;
    virtual IBuilderConfig *createBuilderConfig() noexcept = 0;
    virtual IOptimizationProfile *createOptimizationProfile() noexcept = 0;
    virtual IHostMemory *buildSerializedNetwork(INetworkDefinition &network, IBuilderConfig &config) noexcept = 0;
};
class IExecutionContext {
   public:
    virtual ~IExecutionContext() noexcept = default;
    virtual bool setBindingDimensions(int32_t index, Dims dims) noexcept = 0;
    virtual Dims getBindingDimensions(int32_t index) const noexcept = 0;
    virtual bool allInputDimensionsSpecified() const noexcept = 0;
    virtual bool enqueueV2(void *const *bindings, cudaStream_t stream, void *consumed) noexcept = 0;
};
class ICudaEngine {
   public:
    virtual ~ICudaEngine() noexcept = default;
    virtual int32_t getNbBindings() const noexcept = 0;
    virtual int32_t getBindingIndex(const char *name) const noexcept = 0;
    virtual bool bindingIsInput(int32_t index) const noexcept = 0;
    virtual DataType getBindingDataType(int32_t index) const noexcept = 0;
    virtual IExecutionContext *createExecutionContext() noexcept = 0;
};
class IRuntime {
   public:
    virtual ~IRuntime() noexcept = default;
    virtual ICudaEngine *deserializeCudaEngine(const void *data, size_t bytes) noexcept = 0;
};

IBuilder *createInferBuilder(ILogger &logger) noexcept;
IRuntime *createInferRuntime(ILogger &logger) noexcept;

}  // namespace nvinfer1

extern "C" nvinfer1::IPluginRegistry *getPluginRegistry() noexcept;
extern "C" int32_t getInferLibVersion() noexcept;
