// ExecuTorch kernel edgeformer::dsa.out, for ExecuTorch 1.x. Loading this library registers it, before a method is
// loaded; a process may load it once. Needs the headers and libexecutorch of the runtime it is loaded into.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/core/event_tracer_hooks.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "binding.h"

using namespace edgeformer;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
typedef executorch::aten::optional<Tensor> maybe_tensor;

namespace {

const char *look(const Tensor &x, ScalarType type, view *v) {
    if (x.scalar_type() != type) return "operands are float32, lengths int32";
    if (x.dim() > 4) return "an operand has more than four axes";
    if (!executorch::runtime::tensor_is_contiguous(x)) return "operands are contiguous";
    v->data = x.const_data_ptr();
    v->rank = x.dim();
    for (int d = 0; d < x.dim(); d++) v->dims[d] = x.size(d);
    return NULL;
}

void run(void *pool, int32_t tasks, void (*task)(void *, int32_t, int32_t), void *arg) {
    slots s = {task, arg, tasks, 0};
    const int32_t threads = *static_cast<const int32_t *>(pool);
    executorch::extension::parallel_for(0, threads < tasks ? threads : tasks, 1, [&](int64_t slot, int64_t end) {
        for (; slot < end; slot++) s.work((int32_t)slot);
    });
    s.work(0);  // whatever was not done; nothing as a rule
}

const char *attend(const dsa_config &attributes, const view in[OPERANDS], float *out) {
    dsa_config c = attributes;
    if (const char *why = sizes(&c, in)) return why;
    const int64_t cores = executorch::extension::get_thread_count();
    int32_t threads = cores < 1 ? 1 : cores > 32 ? 32 : (int32_t)cores;
    const dsa_parallel parallel = {&threads, threads, run};
    return call(&c, in, threads > 1 ? &parallel : NULL, out);
}

// The parameters are the schema's, one by one: the boxing reads them off this signature.
Tensor &dsa_out(KernelRuntimeContext &context, const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &wq,
                const Tensor &wk, const Tensor &dist_bias, const Tensor &sink_bias, const Tensor &theta,
                const maybe_tensor &q_len, const maybe_tensor &kv_len, const maybe_tensor &position_bias,
                int64_t block_q, int64_t block_k, int64_t rule, int64_t min_blocks, int64_t max_blocks,
                int64_t force_diag, int64_t n_sink, int64_t causal, int64_t q_offset, int64_t select_per_kv,
                int64_t dense_below, int64_t compute_as, double scale, Tensor &out) {
    // Generated wrappers of the runtime's own kernels do this; a profile would miss ours.
    executorch::runtime::internal::EventTracerProfileOpScope watched(context.internal_event_tracer(), "native_call_edgeformer::dsa.out");
    view in[OPERANDS];
    memset(in, 0, sizeof in);
    const char *why = NULL;
    const Tensor *operands[] = {&q, &k, &v, &wq, &wk, &dist_bias, &sink_bias, &theta};
    for (int i = 0; i < Q_LEN && !why; i++) why = look(*operands[i], ScalarType::Float, &in[i]);
    if (!why && q_len.has_value()) why = look(q_len.value(), ScalarType::Int, &in[Q_LEN]);
    if (!why && kv_len.has_value()) why = look(kv_len.value(), ScalarType::Int, &in[KV_LEN]);
    if (!why && position_bias.has_value()) why = look(position_bias.value(), ScalarType::Float, &in[POSITION]);
    if (!why && executorch::runtime::resize_tensor(out, q.sizes()) != Error::Ok) why = "the output cannot be resized";
    const int64_t compute = compute_as;
    dsa_config c = defaults();
#define X(name, value) c.name = (int32_t)name;
    DSA_INTS(X)
#undef X
    c.scale = (float)scale;
    if (!why) why = attend(c, in, out.mutable_data_ptr<float>());
    ET_KERNEL_CHECK_MSG(context, !why, InvalidArgument, out, "edgeformer DSA: %s", why);
    return out;
}

}  // namespace

EXECUTORCH_LIBRARY(edgeformer, "dsa.out", dsa_out);
