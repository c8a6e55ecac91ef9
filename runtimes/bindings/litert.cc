// LiteRT / TFLite external delegate: takes STABLEHLO_COMPOSITE "edgeformer.dsa" and CUSTOM "edgeformer.dsa" nodes.
// No upstream header. The structures that cross the border are read by byte offsets, which hold for LP64 from
// tflite-runtime 2.14 to ai-edge-litert 2.3: their fields are only ever added at the end.
#include "binding.h"

using namespace edgeformer;

static_assert(sizeof(void *) == 8, "the offsets are those of 64-bit pointers");

enum { ABSENT = -1, FLOAT32 = 1, INT32 = 2, OP_CUSTOM = 32, OP_DELEGATE = 51, OP_COMPOSITE = 206, ALLOW_DYNAMIC = 1, VERSION = 1 };
enum { TENSOR_BYTES = 112, TENSOR_TYPE = 0, TENSOR_DATA = 8, TENSOR_DIMS = 16 };
enum { NODE_INPUTS = 0, NODE_OUTPUTS = 8, NODE_USER = 32, NODE_BUILTIN = 40, NODE_CUSTOM = 48, NODE_CUSTOM_BYTES = 56 };
enum { OP_INIT = 0, OP_FREE = 8, OP_PREPARE = 16, OP_INVOKE = 24, OP_BUILTIN = 40, OP_NAME = 48, OP_VERSION = 56 };
enum {
    CONTEXT_PLAN = 8,
    CONTEXT_TENSORS = 16,
    CONTEXT_RESIZE = 32,
    CONTEXT_ERROR = 40,
    CONTEXT_NODE = 56,
    CONTEXT_REPLACE = 64,
    CONTEXT_THREADS = 72,
};
enum { PARAMS_NODES = 8 };
enum { DELEGATE_PREPARE = 8, DELEGATE_FLAGS = 40, DELEGATE_BYTES = 128 };  // more than it has, zeroed
enum { COMPOSITE_NAME = 0, COMPOSITE_ATTRIBUTES = 16, COMPOSITE_BYTES = 24 };

// Passed by value, in memory: bytes beyond what the runtime knows do no harm, missing ones would.
struct registration {
    uint64_t words[19];
};

typedef int ints;  // an array whose first element is its count

template <class T>
static T get(const void *p, int offset) {
    T value;
    memcpy(&value, (const char *)p + offset, sizeof value);
    return value;
}
template <class T>
static void put(void *p, int offset, T value) {
    memcpy((char *)p + offset, &value, sizeof value);
}

static ints *new_ints(int n) {  // freed by whoever gets it
    ints *a = (ints *)malloc(sizeof(int) * (size_t)(n + 1));
    if (a) a[0] = n;
    return a;
}

static char *tensor_at(void *context, int i) { return get<char *>(context, CONTEXT_TENSORS) + (size_t)i * TENSOR_BYTES; }

// ---- FlexBuffers: one number of a map. The root is at the end: its value, its type, the width of its value.

static uint64_t flex_uint(const uint8_t *p, int width) {
    uint64_t value = 0;
    memcpy(&value, p, (size_t)width);
    return value;
}

static double flex_number(const uint8_t *p, int width, bool is_float) {
    if (is_float && width == 4) return get<float>(p, 0);
    if (is_float) return width == 8 ? get<double>(p, 0) : 0;
    const int unused = 64 - 8 * width;
    return (double)((int64_t)(flex_uint(p, width) << unused) >> unused);
}

static bool flex_get(const uint8_t *bytes, size_t n, const char *key, double *out) {
    enum { INT = 1, FLOAT = 3, INDIRECT_INT = 6, INDIRECT_FLOAT = 8, MAP = 9, BOOL = 26 };
    if (n < 3 || bytes[n - 2] >> 2 != MAP) return false;
    const int root = bytes[n - 1], width = 1 << (bytes[n - 2] & 3);
    const uint8_t *at = bytes + n - 2 - root, *values = at - flex_uint(at, root);
    const uint64_t count = flex_uint(values - width, width);
    const int key_width = (int)flex_uint(values - 2 * width, width);
    const uint8_t *keys = values - 3 * width - flex_uint(values - 3 * width, width);
    for (uint64_t i = 0; i < count; i++) {
        const uint8_t *name = keys + i * (uint64_t)key_width, *value = values + i * (uint64_t)width;
        if (strcmp((const char *)(name - flex_uint(name, key_width)), key)) continue;
        const int packed = values[count * (uint64_t)width + i], type = packed >> 2;
        const bool indirect = type >= INDIRECT_INT && type <= INDIRECT_FLOAT;
        if (!indirect && type != BOOL && (type < INT || type > FLOAT)) return false;
        const uint8_t *from = indirect ? value - flex_uint(value, width) : value;
        *out = flex_number(from, indirect ? 1 << (packed & 3) : width, type == FLOAT || type == INDIRECT_FLOAT);
        return true;
    }
    return false;
}

// ---- The nodes of one delegate kernel.

struct layer {
    int inputs[OPERANDS], output;
    dsa_config c;
};
struct kernel {
    int count;
    layer *layers;
};

static int claimed;  // nodes, since the library was loaded

// The attributes of a node of ours; false for any other node, or one of a later version.
static bool attributes(const void *node, const void *op, const uint8_t **bytes, size_t *n) {
    const void *composite = get<void *>(node, NODE_BUILTIN);
    const char *name = get<const char *>(op, OP_NAME);
    const int builtin = get<int32_t>(op, OP_BUILTIN);
    if (builtin == OP_COMPOSITE && composite) {
        name = get<const char *>(composite, COMPOSITE_NAME);
        *bytes = get<const uint8_t *>(composite, COMPOSITE_ATTRIBUTES), *n = get<size_t>(composite, COMPOSITE_BYTES);
    } else if (builtin == OP_CUSTOM) {
        *bytes = get<const uint8_t *>(node, NODE_CUSTOM), *n = (size_t)get<int32_t>(node, NODE_CUSTOM_BYTES);
    } else {
        return false;
    }
    double version;
    return name && !strcmp(name, "edgeformer.dsa") && *bytes && flex_get(*bytes, *n, "version", &version) &&
           version == VERSION;
}

static bool ours(const void *node, const void *op, layer *l) {
    const uint8_t *bytes;
    size_t n;
    if (!attributes(node, op, &bytes, &n)) return false;
    const ints *in = get<const ints *>(node, NODE_INPUTS), *out = get<const ints *>(node, NODE_OUTPUTS);
    if (in[0] < POSITION || in[0] > OPERANDS || out[0] != 1) return false;  // POSITION is the last, and may be missing
    if (!l) return true;
    for (int i = 0; i < OPERANDS; i++) l->inputs[i] = i < in[0] ? in[1 + i] : ABSENT;
    l->output = out[1];
    l->c = defaults();
    double value;
#define X(name, ignored)                                                                                              \
    if (flex_get(bytes, n, #name, &value)) l->c.name = (int32_t)value;
    DSA_INTS(X)
#undef X
    if (flex_get(bytes, n, "scale", &value)) l->c.scale = (float)value;
    return true;
}

static bool node_at(void *context, int id, void **node, void **op) {
    return !get<int (*)(void *, int, void **, void **)>(context, CONTEXT_NODE)(context, id, node, op);
}

static void *init(void *context, const char *parameters, size_t) {
    const ints *ids = get<const ints *>(parameters, PARAMS_NODES);
    kernel *k = (kernel *)calloc(1, sizeof *k);
    if (k) k->layers = (layer *)calloc((size_t)ids[0], sizeof(layer));
    for (int i = 0; k && k->layers && i < ids[0]; i++) {
        void *node, *op;
        if (node_at(context, ids[1 + i], &node, &op) && ours(node, op, k->layers + k->count)) k->count++;
    }
    return k;
}

static void release(void *, void *opaque) {
    kernel *k = (kernel *)opaque;
    if (k) free(k->layers);
    free(k);
}

static int refuse(void *context, const char *why) {
    get<void (*)(void *, const char *, ...)>(context, CONTEXT_ERROR)(context, "edgeformer DSA: %s", why);
    return 1;
}

// What the operand is, or why it cannot be used. A layout that differs from the offsets above shows here.
static const char *look(void *context, int id, operand i, view *v) {
    memset(v, 0, sizeof *v);
    if (id == ABSENT) return NULL;
    const char *tensor = tensor_at(context, id);
    const ints *dims = get<const ints *>(tensor, TENSOR_DIMS);
    if (get<int32_t>(tensor, TENSOR_TYPE) != (is_length(i) ? INT32 : FLOAT32)) return "operands are float32, lengths int32";
    if (!dims || dims[0] < 0 || dims[0] > 4) return "an operand has more than four axes";
    v->data = get<const void *>(tensor, TENSOR_DATA);
    v->rank = dims[0];
    for (int d = 0; d < dims[0]; d++) v->dims[d] = dims[1 + d];
    return NULL;
}

static const char *looks(void *context, const layer *l, dsa_config *c, view in[OPERANDS]) {
    for (int i = 0; i < OPERANDS; i++)
        if (const char *why = look(context, l->inputs[i], (operand)i, &in[i])) return why;
    *c = l->c;
    return sizes(c, in);
}

static int prepare(void *context, void *node) {
    const kernel *k = get<const kernel *>(node, NODE_USER);
    if (!k) return refuse(context, "out of memory");
    for (int x = 0; x < k->count; x++) {
        const layer *l = k->layers + x;
        dsa_config c;
        view in[OPERANDS];
        if (const char *why = looks(context, l, &c, in)) return refuse(context, why);
        const ints *q = get<const ints *>(tensor_at(context, l->inputs[Q]), TENSOR_DIMS);
        const ints *out = get<const ints *>(tensor_at(context, l->output), TENSOR_DIMS);
        if (out && out[0] == 4 && !memcmp(out, q, 5 * sizeof(int))) continue;
        ints *size = new_ints(4);
        if (!size) return refuse(context, "out of memory");
        memcpy(size, q, 5 * sizeof(int));
        if (get<int (*)(void *, void *, ints *)>(context, CONTEXT_RESIZE)(context, tensor_at(context, l->output), size))
            return refuse(context, "the output cannot be resized");
    }
    return 0;
}

// ---- Threads: the interpreter lends none, so there is one small pool for the process, made when first needed.

enum { MOST_THREADS = 16 };

struct own_pool {
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    slots *job;
    int32_t helpers, wanted, working;  // threads that exist; that the job still lacks; that are at it
};
static own_pool pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, 0, 0, 0};

static void *help(void *) {
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.wanted) pthread_cond_wait(&pool.start, &pool.lock);
        const int32_t slot = pool.wanted--;  // the caller is slot 0
        slots *job = pool.job;
        pool.working++;
        pthread_mutex_unlock(&pool.lock);
        job->work(slot);
        pthread_mutex_lock(&pool.lock);
        if (!--pool.working) pthread_cond_signal(&pool.done);
    }
    return NULL;
}

static void hire(int32_t helpers) {
    for (pthread_t thread; pool.helpers < helpers; pool.helpers++) {
        if (pthread_create(&thread, NULL, help, NULL)) return;  // fewer then
        pthread_detach(thread);
    }
}

static void run(void *threads, int32_t tasks, void (*task)(void *, int32_t, int32_t), void *arg) {
    slots job = {task, arg, tasks, 0};
    pthread_mutex_lock(&pool.lock);
    const bool mine = !pool.job;  // two interpreters at once: the second works alone
    if (mine) {
        const int32_t helpers = *(const int32_t *)threads - 1;
        hire(helpers);
        pool.job = &job;
        pool.wanted = helpers < pool.helpers ? helpers : pool.helpers;
        pthread_cond_broadcast(&pool.start);
    }
    pthread_mutex_unlock(&pool.lock);
    job.work(0);
    if (!mine) return;
    pthread_mutex_lock(&pool.lock);
    pool.wanted = 0;  // who has not started finds nothing left
    while (pool.working) pthread_cond_wait(&pool.done, &pool.lock);
    pool.job = NULL;
    pthread_mutex_unlock(&pool.lock);
}

static int32_t threads_of(void *context) {
    const int32_t wanted = get<int32_t>(context, CONTEXT_THREADS);  // what num_threads was; -1: as the runtime likes
    return wanted < 1 ? 1 : wanted > MOST_THREADS ? (int32_t)MOST_THREADS : wanted;
}

static int invoke(void *context, void *node) {
    const kernel *k = get<const kernel *>(node, NODE_USER);
    int32_t threads = threads_of(context);
    const dsa_parallel parallel = {&threads, threads, run};
    for (int x = 0; x < k->count; x++) {
        const layer *l = k->layers + x;
        dsa_config c;
        view in[OPERANDS];
        const char *why = looks(context, l, &c, in);
        float *out = get<float *>(tensor_at(context, l->output), TENSOR_DATA);
        if (!why) why = call(&c, in, threads > 1 ? &parallel : NULL, out);
        if (why) return refuse(context, why);
    }
    return 0;
}

// ---- The delegate.

static registration kernel_registration() {
    registration r;
    memset(&r, 0, sizeof r);
    put(&r, OP_INIT, &init), put(&r, OP_FREE, &release), put(&r, OP_PREPARE, &prepare), put(&r, OP_INVOKE, &invoke);
    put<int32_t>(&r, OP_BUILTIN, OP_DELEGATE), put<int32_t>(&r, OP_VERSION, 1);
    put(&r, OP_NAME, (const char *)"EdgeformerDSA");
    return r;
}

static int claim(void *context, void *delegate) {
    ints *plan;  // the runtime's own, and reused by it: copied before anything else is asked
    if (get<int (*)(void *, ints **)>(context, CONTEXT_PLAN)(context, &plan)) return 1;
    ints *ids = new_ints(plan[0]), *mine = new_ints(plan[0]);
    int count = 0, failed = !ids || !mine;
    if (!failed) memcpy(ids, plan, sizeof(int) * (size_t)(plan[0] + 1));
    for (int i = 0; !failed && i < ids[0]; i++) {
        void *node, *op;
        failed = !node_at(context, ids[1 + i], &node, &op);
        if (!failed && ours(node, op, NULL)) mine[1 + count++] = ids[1 + i];
    }
    if (!failed && count) {
        mine[0] = count;
        failed = get<int (*)(void *, registration, const ints *, void *)>(context, CONTEXT_REPLACE)(
            context, kernel_registration(), mine, delegate);
        if (!failed) __atomic_fetch_add(&claimed, count, __ATOMIC_RELAXED);
    }
    free(ids);
    free(mine);
    return failed;
}

EXPORT void *tflite_plugin_create_delegate(const char *const *, const char *const *, size_t, void (*)(const char *)) {
    void *delegate = calloc(1, DELEGATE_BYTES);
    if (!delegate) return NULL;
    put(delegate, DELEGATE_PREPARE, &claim);
    // Without it the runtime prepares a CUSTOM node before the delegate may take it, and fails.
    put<int64_t>(delegate, DELEGATE_FLAGS, ALLOW_DYNAMIC);
    return delegate;
}

EXPORT void tflite_plugin_destroy_delegate(void *delegate) { free(delegate); }

EXPORT int edgeformer_dsa_claimed() { return __atomic_load_n(&claimed, __ATOMIC_RELAXED); }
