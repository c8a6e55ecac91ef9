// dsa_runner MODEL.pte LENGTH IDS MASK OUT: one inference of a text model. The inputs are files of int64, the output is
// written as float32. Prints the operator's calls as JSON: the proof that the kernel ran.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::runtime::EValue;

extern "C" int64_t edgeformer_dsa_calls();
extern "C" const char *edgeformer_dsa_kernels();

static std::vector<int64_t> read(const char *path, size_t count) {
    std::vector<int64_t> values(count);
    std::ifstream file(path, std::ios::binary);
    file.read(reinterpret_cast<char *>(values.data()), (std::streamsize)(count * sizeof(int64_t)));
    if (!file) {
        fprintf(stderr, "%s does not hold %zu int64 values\n", path, count);
        exit(2);
    }
    return values;
}

int main(int argc, char **argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: dsa_runner MODEL.pte LENGTH IDS MASK OUT\n");
        return 2;
    }
    const int length = atoi(argv[2]);
    if (length < 1) return fprintf(stderr, "LENGTH is %s; it must be at least 1\n", argv[2]), 2;
    std::vector<int64_t> ids = read(argv[3], (size_t)length), mask = read(argv[4], (size_t)length);
    auto first = executorch::extension::from_blob(ids.data(), {1, length}, ScalarType::Long);
    auto second = executorch::extension::from_blob(mask.data(), {1, length}, ScalarType::Long);
    Module module(std::string(argv[1]), Module::LoadMode::Mmap);
    auto result = module.execute("forward", {EValue(first), EValue(second)});
    if (!result.ok()) {
        fprintf(stderr, "%s did not run: error 0x%x\n", argv[1], (unsigned)result.error());
        return 1;
    }
    const auto out = (*result)[0].toTensor();
    std::ofstream file(argv[5], std::ios::binary);
    file.write(reinterpret_cast<const char *>(out.const_data_ptr<float>()), (std::streamsize)(out.numel() * sizeof(float)));
    printf("{\"native_calls\": %lld, \"kernel_set\": \"%s\"}\n", (long long)edgeformer_dsa_calls(), edgeformer_dsa_kernels());
    return file ? 0 : 1;
}
