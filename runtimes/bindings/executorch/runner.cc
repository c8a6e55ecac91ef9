// edgeformer_runner MODEL.pte METHOD THREADS [profile]: runs methods over and over, for whoever holds its two pipes. It
// has the operator, the kernels and XNNPACK linked in, needs no Python and no torch, and uses no C++ library itself.
// METHOD is loaded before it answers; others when they are first asked for. Nothing is kept from one run to the next:
// a decoder's keys and values are outputs of one request and inputs of another.
//
// The protocol (version 2). Little-endian; every message is `uint32 bytes`, then that many bytes.
//   Started, it sends one reply: uint32 version, uint32 threads, string runtime version, uint32 n, n strings: methods.
//   A request is one letter and its operands; a reply is `uint8 0` and its content, or `uint8 1` and a string: the error.
//     R  string method, uint32 most, uint32 n, n tensors  run  -> uint64 nanoseconds, uint32 n, n tensors: the method's
//                                                                 outputs, the first `most` of them
//     J                              journal        -> string kernel set, int64 calls, uint32 n, n pairs of int64:
//                                                      kept and candidate blocks of the last calls; and begins anew
//     P  string method, uint32 n, n tensors  run, profiled  -> uint32 n, n times (string operator, uint64 nanoseconds);
//                                                      for a runner started with `profile`: watching costs time
//   string: uint32 bytes, UTF-8.   tensor: uint8 type (ExecuTorch's: 3 int32, 4 int64, 6 float32), uint8 rank,
//   uint32 per axis, the values.
// `edgeformer_runner --version` prints the version of the runtime. It ends when its input ends. An error in a request leaves it usable; one in the beginning ends it with code 1.
#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/runtime/core/event_tracer.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>
#include <new>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

using namespace executorch::runtime;
using executorch::aten::DimOrderType;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;

extern "C" int64_t edgeformer_dsa_calls();
extern "C" void edgeformer_dsa_reset();
extern "C" int32_t edgeformer_dsa_kept(int32_t most, int64_t *pairs);
extern "C" const char *edgeformer_dsa_kernels();

// All that the headers want of a C++ library: this program links none, because the runtime brings its own.
void operator delete(void *p, size_t) noexcept { free(p); }
#ifdef _LIBCPP_VERSION
namespace std {
inline namespace __1 {
__attribute__((weak)) void __libcpp_verbose_abort(const char *, ...) noexcept { abort(); }
}  // namespace __1
}  // namespace std
#endif

// The wheel has this in its library and not in its headers.
namespace executorch::extension::threadpool {
class ThreadPool {
   public:
    size_t get_thread_count() const;
    bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool *get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

enum { VERSION = 2, INPUTS = 16, AXES = 8, LAYERS = 1024, EVENTS = 256, NAME = 96, ALIGNMENT = 64 };
const size_t MOST = (size_t)1 << 30;  // of a message

void *room(size_t bytes) {
    void *p = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
    if (!p) fprintf(stderr, "out of memory for %zu bytes\n", bytes), exit(1);
    return p;
}

// --- messages --------------------------------------------------------------------------------------------------------

struct Message {
    char *data = nullptr;
    size_t size = 0, held = 0, at = 0;
    bool whole = true;  // nothing was read past the end

    void hold(size_t bytes) {
        if (bytes <= held) return;
        held = bytes * 2;
        data = (char *)realloc(data, held);
        if (!data) fprintf(stderr, "out of memory for %zu bytes\n", held), exit(1);
    }
    void clear() { size = at = 0, whole = true; }
    void put(const void *from, size_t bytes) {
        hold(size + bytes);
        memcpy(data + size, from, bytes);
        size += bytes;
    }
    template <typename T>
    void put(T value) { put(&value, sizeof value); }
    void text(const char *words) {
        put((uint32_t)strlen(words));
        put(words, strlen(words));
    }
    const char *take(size_t bytes) {
        if (bytes > size - at) return whole = false, nullptr;
        at += bytes;
        return data + at - bytes;
    }
    template <typename T>
    T take() {
        T value = 0;
        if (const char *from = take(sizeof value)) memcpy(&value, from, sizeof value);
        return value;
    }
};

bool all(int file, char *data, size_t bytes, bool writing) {
    while (bytes) {
        const ssize_t n = writing ? write(file, data, bytes) : read(file, data, bytes);
        if (n <= 0) return false;
        data += n, bytes -= (size_t)n;
    }
    return true;
}

bool receive(Message *m) {
    uint32_t bytes;
    m->clear();
    if (!all(STDIN_FILENO, (char *)&bytes, sizeof bytes, false) || bytes > MOST) return false;
    m->hold(bytes);
    m->size = bytes;
    return all(STDIN_FILENO, m->data, bytes, false);
}

int answers = STDOUT_FILENO;  // a copy: what a library prints must not land between two messages

bool send(const Message &m) {
    uint32_t bytes = (uint32_t)m.size;
    return all(answers, (char *)&bytes, sizeof bytes, true) && all(answers, m.data, m.size, true);
}

void refuse(Message *out, const char *words, unsigned code = 0) {
    char said[256];
    snprintf(said, sizeof said, code ? "%s (ExecuTorch error 0x%x)" : "%s", words, code);
    out->clear();
    out->put((uint8_t)1);
    out->text(said);
}

// --- memory ----------------------------------------------------------------------------------------------------------

// Blocks of the heap, given back together.
class Heap final : public MemoryAllocator {
    struct Block {
        Block *next;
    } *first = nullptr;

   public:
    Heap() : MemoryAllocator(0, nullptr) {}
    void *allocate(size_t bytes, size_t alignment) override {
        if (alignment > ALIGNMENT) return nullptr;
        Block *block = (Block *)room(bytes + ALIGNMENT);
        block->next = first;
        first = block;
        return (char *)block + ALIGNMENT;
    }
    void reset() override {
        for (Block *next; first; first = next) next = first->next, free(first);
    }
};

// --- profile ---------------------------------------------------------------------------------------------------------

// Time by operator. What XNNPACK does inside a delegate is told by name; the call of the delegate as a whole is not.
class Times final : public EventTracer {
   public:
    struct {
        char name[NAME];
        uint64_t ticks;
    } events[EVENTS];
    int count = 0;

    void add(const char *name, uint64_t ticks) {
        int i = 0;
        while (i < count && strncmp(events[i].name, name, NAME - 1)) i++;
        if (i == EVENTS) return;
        if (i == count) snprintf(events[count++].name, NAME, "%s", name), events[i].ticks = 0;
        events[i].ticks += ticks;
    }
    EventTracerEntry begin(const char *name) {
        EventTracerEntry entry = {};
        entry.event_id = (int64_t)(intptr_t)name;
        entry.start_time = et_pal_current_ticks();
        return entry;
    }
    void end(const EventTracerEntry &entry) {
        const char *name = (const char *)(intptr_t)entry.event_id;
        if (!strncmp(name, "native_call_", 12)) add(name + 12, et_pal_current_ticks() - entry.start_time);
    }
    EventTracerEntry start_profiling(const char *name, ChainID, DebugHandle) override { return begin(name); }
    void end_profiling(EventTracerEntry entry) override { end(entry); }
    EventTracerEntry start_profiling_delegate(const char *name, DelegateDebugIntId) override { return begin(name ? name : ""); }
    void end_profiling_delegate(EventTracerEntry entry, const void *, size_t) override { end(entry); }
    void log_profiling_delegate(const char *name, DelegateDebugIntId, et_timestamp_t start, et_timestamp_t end, const void *,
                                size_t) override {
        if (name) add(name, end - start);
    }
    void create_event_block(const char *) override {}
    void track_allocation(AllocatorID, size_t) override {}
    AllocatorID track_allocator(const char *) override { return 0; }
    Result<bool> log_evalue(const EValue &, LoggedEValueType) override { return false; }
    Result<bool> log_intermediate_output_delegate(const char *, DelegateDebugIntId, const Tensor &) override { return false; }
    Result<bool> log_intermediate_output_delegate(const char *, DelegateDebugIntId, const ArrayRef<Tensor>) override { return false; }
    Result<bool> log_intermediate_output_delegate(const char *, DelegateDebugIntId, const int &) override { return false; }
    Result<bool> log_intermediate_output_delegate(const char *, DelegateDebugIntId, const bool &) override { return false; }
    Result<bool> log_intermediate_output_delegate(const char *, DelegateDebugIntId, const double &) override { return false; }
    void set_delegation_intermediate_output_filter(EventTracerFilterBase *) override {}
};

// --- methods ---------------------------------------------------------------------------------------------------------

// Whether every input has a place of its own: `set_input` copies into it then, and the message may go.
bool copies_inputs(const MethodMeta &meta) {
    for (size_t i = 0; i < meta.num_inputs(); i++) {
        auto info = meta.input_tensor_meta(i);
        if (!info.ok() || !info->is_memory_planned()) return false;
    }
    return true;
}

// The buffers a method plans, as many as it has.
Span<Span<uint8_t>> planned(const MethodMeta &meta) {
    const size_t n = meta.num_memory_planned_buffers();
    auto *spans = (Span<uint8_t> *)room(n * sizeof(Span<uint8_t>));
    for (size_t i = 0; i < n; i++) {
        const size_t bytes = (size_t)meta.memory_planned_buffer_size(i).get();
        new (spans + i) Span<uint8_t>((uint8_t *)room(bytes), bytes);
    }
    return {spans, n};
}

// Stays for as long as the process, also one that does not load: it would not load the next time.
struct Loaded {
    Loaded *next;
    const char *name;  // the program's
    Heap lasting, passing;
    HierarchicalAllocator places;
    MemoryManager memory;
    Result<Method> method;

    Loaded(const Program &program, const MethodMeta &meta, Times *times, Loaded *next)
        : next(next), name(meta.name()), places(planned(meta)), memory(&lasting, &places, &passing),
          method(program.load_method(meta.name(), &memory, times)) {}
};

struct Methods {
    const Program &program;
    Times *times;  // NULL where nobody watches
    Loaded *first = nullptr;

    // NULL, and what is wrong.
    Method *get(const char *name, const char **why, unsigned *code) {
        Loaded *found = first;
        while (found && strcmp(found->name, name)) found = found->next;
        if (!found) {
            auto meta = program.method_meta(name);
            *why = "the program has no such method", *code = (unsigned)meta.error();
            if (!meta.ok()) return nullptr;
            *why = "the method has inputs without a place of their own", *code = (unsigned)Error::NotSupported;
            if (!copies_inputs(*meta)) return nullptr;
            found = first = new (room(sizeof(Loaded))) Loaded(program, *meta, times, first);
        }
        *why = "the method does not load: an operator or a backend is missing", *code = (unsigned)found->method.error();
        return found->method.ok() ? &*found->method : nullptr;
    }
};

// --- requests --------------------------------------------------------------------------------------------------------

size_t item(int type) {
    return type == (int)ScalarType::Float || type == (int)ScalarType::Int ? 4 : type == (int)ScalarType::Long ? 8 : 0;
}

// Sets one input. The method copies it, or reads it from the message while it runs. Returns what is wrong, or NULL.
const char *input(Method &method, size_t index, Message *in, unsigned *code) {
    const int type = in->take<uint8_t>(), rank = in->take<uint8_t>();
    SizesType sizes[AXES];
    DimOrderType order[AXES];
    if (!item(type) || rank > AXES) return "an input is int32, int64 or float32 with at most 8 axes";
    size_t bytes = item(type);
    for (int i = 0; i < rank; i++) {
        sizes[i] = (SizesType)in->take<uint32_t>(), order[i] = (DimOrderType)i;
        if (sizes[i] < 0 || (sizes[i] && bytes > MOST / (size_t)sizes[i])) return "an input is too large";
        bytes *= (size_t)sizes[i];
    }
    const char *values = in->take(bytes);
    if (!in->whole) return "the request is shorter than it says";
    void *copy = room(bytes);  // values stand anywhere in a message, and tensors do not
    memcpy(copy, values, bytes);
    TensorImpl impl((ScalarType)type, rank, sizes, copy, order);
    const Error error = method.set_input(EValue(Tensor(&impl)), index);
    free(copy);  // planned inputs are copied, which `run` has checked
    *code = (unsigned)error;
    return error == Error::Ok ? nullptr : "an input does not fit the method";
}

const char *inputs(Method &method, Message *in, unsigned *code) {
    const uint32_t n = in->take<uint32_t>();
    if (n != method.inputs_size()) return "the method has another number of inputs";
    for (uint32_t i = 0; i < n; i++)
        if (const char *why = input(method, i, in, code)) return why;
    return in->at == in->size ? nullptr : "the request is longer than it says";
}

uint64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// The method that a request names. Answers for itself where there is none: NULL.
Method *named(Methods *methods, Message *in, Message *out) {
    char name[NAME] = {};
    const uint32_t bytes = in->take<uint32_t>();
    const char *text = bytes < sizeof name ? in->take(bytes) : nullptr;
    if (!text) return refuse(out, "the request names no method"), nullptr;
    memcpy(name, text, bytes);
    const char *why;
    unsigned code = 0;
    Method *found = methods->get(name, &why, &code);
    if (!found) refuse(out, why, code);
    return found;
}

void run(Methods *methods, Message *in, Message *out) {
    unsigned code = 0;
    Method *method = named(methods, in, out);
    if (!method) return;
    const uint32_t most = in->take<uint32_t>();
    if (const char *why = inputs(*method, in, &code)) return refuse(out, why, code);
    const uint64_t start = now();
    const Error error = method->execute();
    const uint64_t spent = now() - start;
    if (error != Error::Ok) return refuse(out, "the method failed", (unsigned)error);
    const size_t n = most < method->outputs_size() ? most : method->outputs_size();
    out->put((uint8_t)0);
    out->put(spent);
    out->put((uint32_t)n);
    for (size_t i = 0; i < n; i++) {
        const EValue &value = method->get_output(i);
        if (!value.isTensor() || !item((int)value.toTensor().scalar_type())) return refuse(out, "an output is no float or integer tensor");
        const Tensor tensor = value.toTensor();
        out->put((uint8_t)tensor.scalar_type());
        out->put((uint8_t)tensor.dim());
        for (int axis = 0; axis < tensor.dim(); axis++) out->put((uint32_t)tensor.size(axis));
        out->put(tensor.const_data_ptr(), tensor.nbytes());
    }
}

void journal(Message *out) {
    static int64_t pairs[2 * LAYERS];
    const int32_t n = edgeformer_dsa_kept(LAYERS, pairs);
    out->put((uint8_t)0);
    out->text(edgeformer_dsa_kernels());
    out->put(edgeformer_dsa_calls());
    out->put((uint32_t)n);
    out->put(pairs, 2 * sizeof(int64_t) * (size_t)n);
    edgeformer_dsa_reset();
}

void profile(Methods *methods, Message *in, Message *out) {
    unsigned code = 0;
    Times *times = methods->times;
    if (!times) return refuse(out, "this runner was started without `profile`");
    Method *method = named(methods, in, out);
    if (!method) return;
    if (const char *why = inputs(*method, in, &code)) return refuse(out, why, code);
    times->count = 0;
    const Error error = method->execute();
    if (error != Error::Ok) return refuse(out, "the method failed", (unsigned)error);
    const et_tick_ratio_t ratio = et_pal_ticks_to_ns_multiplier();
    out->put((uint8_t)0);
    out->put((uint32_t)times->count);
    for (int i = 0; i < times->count; i++) {
        out->text(times->events[i].name);
        out->put((uint64_t)(times->events[i].ticks * ratio.numerator / ratio.denominator));
    }
}

// --- the life of it --------------------------------------------------------------------------------------------------

int fail(const char *words, unsigned code) {
    Message out;
    refuse(&out, words, code);
    send(out);
    return 1;
}

void greet(const Program &program) {
    Message out;
    out.put((uint8_t)0);
    out.put((uint32_t)VERSION);
    out.put((uint32_t)executorch::extension::threadpool::get_threadpool()->get_thread_count());
    out.text(RUNTIME_VERSION);
    out.put((uint32_t)program.num_methods());
    for (size_t i = 0; i < program.num_methods(); i++) out.text(program.get_method_name(i).get());
    send(out);
}

void serve(Methods *methods) {
    Message in, out;
    while (receive(&in)) {
        out.clear();
        switch (in.take<char>()) {
            case 'R': run(methods, &in, &out); break;
            case 'J': journal(&out); break;
            case 'P': profile(methods, &in, &out); break;
            default: refuse(&out, "no such request; there are R, J and P");
        }
        if (!send(out)) return;
    }
}

}  // namespace

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "--version")) return puts(RUNTIME_VERSION), 0;
    const bool profiled = argc == 5 && !strcmp(argv[4], "profile");
    const int threads = argc == 4 || profiled ? atoi(argv[3]) : 0;
    if (threads < 1) {
        fprintf(stderr, "usage: edgeformer_runner MODEL.pte METHOD THREADS [profile], at least one thread\n");
        return 2;
    }
    answers = dup(STDOUT_FILENO);
    dup2(STDERR_FILENO, STDOUT_FILENO);
    runtime_init();
    // Before anything is loaded: afterwards it would take the pool from under those who use it.
    executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool((uint32_t)threads);
    auto loader = executorch::extension::MmapDataLoader::from(argv[1], executorch::extension::MmapDataLoader::MlockConfig::NoMlock);
    if (!loader.ok()) return fail("the file cannot be read", (unsigned)loader.error());
    auto program = Program::load(&loader.get());
    if (!program.ok()) return fail("the file is no program of this version of ExecuTorch", (unsigned)program.error());
    Times events;
    Methods methods{*program, profiled ? &events : nullptr};
    const char *why;
    unsigned code;
    if (!methods.get(argv[2], &why, &code)) return fail(why, code);
    greet(*program);
    serve(&methods);
    return 0;
}
