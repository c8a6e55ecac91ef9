// As NvInfer.h here: the parser's declarations that our runner uses. For tests only.
#pragma once
#include <NvInfer.h>

namespace nvonnxparser {

class IParserError {
   public:
    virtual int node() const = 0;
    virtual const char *desc() const = 0;

   protected:
    virtual ~IParserError() {}
};
class IParser {
   public:
    virtual ~IParser() noexcept = default;
    virtual bool parseFromFile(const char *path, int verbosity) = 0;
    virtual int getNbErrors() const = 0;
    virtual const IParserError *getError(int index) const = 0;
};
IParser *createParser(nvinfer1::INetworkDefinition &network, nvinfer1::ILogger &logger);

}  // namespace nvonnxparser
