// ONNX Runtime custom-op library: ai.edgeformer::DSA version 1 on the CPU provider, for ONNX Runtime 1.16 and later.
// No ONNX Runtime header: the function table and the op record only ever grow at their end, so slot numbers are enough.
#include "binding.h"

using namespace edgeformer;

typedef void status;       // opaque; NULL is success
typedef void *const *api;  // the table of functions

// Slots up to 99 exist since API version 1; PARALLEL_FOR since 17, that is release 1.17.
enum slot {
    CREATE_STATUS = 0,
    CREATE_DOMAIN = 26,
    DOMAIN_ADD = 27,
    SESSION_ADD_DOMAIN = 28,
    TENSOR_DATA = 51,
    RANK_OF = 61,
    DIMS_OF = 62,
    SHAPE_OF = 65,
    ATTRIBUTE_FLOAT = 85,
    ATTRIBUTE_INT = 86,
    INPUT_COUNT = 88,
    INPUT = 90,
    OUTPUT = 91,
    RELEASE_STATUS = 93,
    RELEASE_SHAPE = 99,
    PARALLEL_FOR = 274,
};
template <int at, class R, class... A>
static R ort(api a, A... x) {
    return ((R(*)(A...))a[at])(x...);
}

enum { API_VERSION = 16, INVALID_ARGUMENT = 2, FLOAT32 = 1, INT32 = 6, OPTIONAL = 1 };

// The op record: its version, then callbacks. Version 16 ends before the newer ones, which stay NULL.
struct op_record {
    uint32_t version;
    const void *f[32];
};
static_assert(offsetof(op_record, f) == 8, "the callbacks start at offset 8");
enum callback {
    NAME = 1,
    PROVIDER = 2,
    INPUT_TYPE = 3,
    INPUTS = 4,
    OUTPUT_TYPE = 5,
    OUTPUTS = 6,
    DESTROY = 8,
    INPUT_KIND = 9,
    OUTPUT_KIND = 10,
    INPUT_MEMORY = 11,
    VARIADIC_FIRST = 12,
    VARIADIC_LAST = 15,
    CREATE = 16,
    COMPUTE = 17,
};

#define TRY(x)                                                                                                        \
    do {                                                                                                              \
        status *failed_ = (x);                                                                                        \
        if (failed_) return failed_;                                                                                  \
    } while (0)

static int release;  // of ONNX Runtime: 17 means 1.17

static status *refuse(api a, const char *why) {
    char text[200];
    snprintf(text, sizeof text, "edgeformer DSA: %s", why);
    return ort<CREATE_STATUS, status *>(a, (int)INVALID_ARGUMENT, (const char *)text);
}

struct kernel {
    api a;
    dsa_config c;
};

// An attribute the node does not carry keeps its default.
static void integer(api a, const void *info, const char *name, int32_t *value) {
    int64_t found;
    status *missing = ort<ATTRIBUTE_INT, status *>(a, info, name, &found);
    if (missing) return ort<RELEASE_STATUS, void>(a, missing);
    *value = found > INT32_MAX ? INT32_MAX : found < INT32_MIN ? INT32_MIN : (int32_t)found;
}

static status *create(const op_record *, api a, const void *info, void **out) {
    kernel *k = (kernel *)malloc(sizeof *k);
    if (!k) return refuse(a, "out of memory");
    *k = {a, defaults()};
#define X(name, value) integer(a, info, #name, &k->c.name);
    DSA_INTS(X)
#undef X
    float scale;
    status *missing = ort<ATTRIBUTE_FLOAT, status *>(a, info, (const char *)"scale", &scale);
    if (missing)
        ort<RELEASE_STATUS, void>(a, missing);
    else
        k->c.scale = scale;
    *out = k;
    return NULL;
}

static status *shape(api a, const void *value, view *v) {
    void *info;
    size_t rank = 0;
    TRY((ort<SHAPE_OF, status *>(a, value, &info)));
    status *failed = ort<RANK_OF, status *>(a, (const void *)info, &rank);
    if (!failed && rank <= 4) failed = ort<DIMS_OF, status *>(a, (const void *)info, (int64_t *)v->dims, rank);
    ort<RELEASE_SHAPE, void>(a, info);
    v->rank = rank <= 4 ? (int64_t)rank : -1;
    return failed;
}

static status *inputs(api a, const void *context, view in[OPERANDS]) {
    size_t count;
    TRY((ort<INPUT_COUNT, status *>(a, context, &count)));
    for (size_t i = 0; i < OPERANDS; i++) {
        const void *value = NULL;
        memset(&in[i], 0, sizeof in[i]);
        if (i < count) TRY((ort<INPUT, status *>(a, context, i, &value)));
        if (!value) continue;
        TRY((ort<TENSOR_DATA, status *>(a, (void *)value, (void **)&in[i].data)));
        TRY(shape(a, value, &in[i]));
    }
    return NULL;
}

// The session's own threads. How many there are is not told, so there is a slot for every core; idle slots cost nothing.
struct session_pool {
    api a;
    const void *context;
    int32_t threads;
};

static void run(void *pool, int32_t tasks, void (*task)(void *, int32_t, int32_t), void *arg) {
    session_pool *p = (session_pool *)pool;
    slots s = {task, arg, tasks, 0};
    void (*each)(void *, size_t) = [](void *x, size_t slot) { ((slots *)x)->work((int32_t)slot); };
    const size_t n = (size_t)(tasks < p->threads ? tasks : p->threads);
    status *failed = ort<PARALLEL_FOR, status *>(p->a, p->context, each, n, n, (void *)&s);
    if (!failed) return;
    ort<RELEASE_STATUS, void>(p->a, failed);
    s.work(0);  // whatever was not done
}

static status *compute(void *opaque, void *context) {
    kernel *k = (kernel *)opaque;
    api a = k->a;
    view in[OPERANDS];
    TRY(inputs(a, context, in));
    dsa_config c = k->c;
    const char *why = sizes(&c, in);
    if (why) return refuse(a, why);
    void *value;
    float *out;
    TRY((ort<OUTPUT, status *>(a, context, (size_t)0, (const int64_t *)in[Q].dims, (size_t)4, &value)));
    TRY((ort<TENSOR_DATA, status *>(a, value, (void **)&out)));
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    session_pool pool = {a, context, (int32_t)(cores < 1 ? 1 : cores > 32 ? 32 : cores)};
    const dsa_parallel parallel = {&pool, pool.threads, run};
    why = call(&c, in, release >= 17 ? &parallel : NULL, out);
    return why ? refuse(a, why) : NULL;
}

static const char *name(const op_record *) { return "DSA"; }
static const char *provider(const op_record *) { return NULL; }
static int input_type(const op_record *, size_t i) { return is_length((int64_t)i) ? INT32 : FLOAT32; }
static int output_type(const op_record *, size_t) { return FLOAT32; }
static int input_kind(const op_record *, size_t i) { return i < Q_LEN ? 0 : OPTIONAL; }
static size_t input_count(const op_record *) { return OPERANDS; }
static size_t output_count(const op_record *) { return 1; }
static int zero(const op_record *, size_t) { return 0; }  // a required output; memory of the default kind
static int one(const op_record *) { return 1; }           // variadic arguments, of which there are none
static void destroy(void *k) { free(k); }

static void describe(op_record *op) {
    op->version = API_VERSION;
    op->f[NAME] = (const void *)name, op->f[PROVIDER] = (const void *)provider;
    op->f[INPUT_TYPE] = (const void *)input_type, op->f[INPUTS] = (const void *)input_count;
    op->f[OUTPUT_TYPE] = (const void *)output_type, op->f[OUTPUTS] = (const void *)output_count;
    op->f[INPUT_KIND] = (const void *)input_kind;
    op->f[OUTPUT_KIND] = op->f[INPUT_MEMORY] = (const void *)zero;
    for (int i = VARIADIC_FIRST; i <= VARIADIC_LAST; i++) op->f[i] = (const void *)one;
    op->f[CREATE] = (const void *)create, op->f[COMPUTE] = (const void *)compute, op->f[DESTROY] = (const void *)destroy;
}

// "1.31.1" -> 31; a second major version would have it all.
static int minor_of(const char *version) {
    const char *dot = strchr(version, '.');
    return atoi(version) > 1 ? 1000 : dot ? atoi(dot + 1) : 0;
}

EXPORT status *RegisterCustomOps(void *options, const void *base) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static op_record op;  // sessions keep pointers to it and to the domain: neither is ever freed
    static void *domain;
    api a = ((api(*const *)(uint32_t))base)[0](API_VERSION);
    if (!a) return NULL;  // older than 1.16: the session will say that DSA is not registered
    pthread_mutex_lock(&lock);
    status *failed = NULL;
    if (!domain) {
        release = minor_of(((const char *(*const *)(void))base)[1]());
        describe(&op);
        void *made;
        failed = ort<CREATE_DOMAIN, status *>(a, (const char *)"ai.edgeformer", &made);
        if (!failed) failed = ort<DOMAIN_ADD, status *>(a, made, (const void *)&op);
        if (!failed) domain = made;
    }
    pthread_mutex_unlock(&lock);
    return failed ? failed : ort<SESSION_ADD_DOMAIN, status *>(a, options, domain);
}
