/* Runs the conformance vectors (tests/golden/dsa/index.json) through the C interface, on every kernel set this CPU has
 * or on the one named: dsa_vectors INDEX [SET]. Prints one line per set; exit status 1 if a case fails. */
#include "dsa.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- As much JSON as the index needs: no escapes, every value a node in a sibling list. */

typedef struct node {
    enum { NUL, NUMBER, STRING, LIST } type; /* an object is a list whose members have keys */
    double number;
    char *text, *key;
    struct node *child, *next;
    int count;
} node;

static void *fresh(size_t n) {
    void *p = calloc(1, n ? n : 1);
    if (!p) exit(2);
    return p;
}

static void space(char **p) {
    while (**p && strchr(" \n\r\t,:", **p)) ++*p;
}

static char *string(char **p) {
    char *from = ++*p;
    *p = strchr(from, '"');
    *(*p)++ = 0;
    return from;
}

static node *value(char **p) {
    node *n = fresh(sizeof *n);
    space(p);
    if (**p == '"') {
        n->type = STRING;
        n->text = string(p);
    } else if (**p == '[' || **p == '{') {
        int keyed = *(*p)++ == '{';
        node **last = &n->child;
        n->type = LIST;
        for (space(p); **p != ']' && **p != '}'; space(p)) {
            char *key = keyed ? string(p) : NULL;
            *last = value(p);
            (*last)->key = key;
            last = &(*last)->next;
            n->count++;
        }
        ++*p;
    } else if (!strncmp(*p, "null", 4)) {
        *p += 4;
    } else {
        n->type = NUMBER;
        n->number = strtod(*p, p);
    }
    return n;
}

static node *find(const node *o, const char *key) {
    for (node *n = o->child; n; n = n->next)
        if (n->key && !strcmp(n->key, key)) return n;
    return NULL;
}

static node *get(const node *o, const char *key) {
    if (find(o, key)) return find(o, key);
    fprintf(stderr, "no key %s\n", key);
    exit(2);
}

static int whole(const node *o, const char *key) { return (int)get(o, key)->number; }
static float real(const node *n) { return n->type == NUL ? NAN : (float)n->number; }

/* ---- Inputs: regenerated, then edited. */

enum { Q, K, V, WQ, WK, DIST, SINK, POSITION, TENSORS };
static const char *const names[TENSORS] = {"q", "k", "v", "wq", "wk", "dist_bias", "sink_bias", "position_bias"};

typedef struct {
    dsa_config c;
    int shape[TENSORS][4];
    float *data[TENSORS], *theta;
    int32_t *q_len, *kv_len;
} inputs;

static size_t size(const int s[4]) { return (size_t)s[0] * (size_t)s[1] * (size_t)s[2] * (size_t)s[3]; }

static void edit(inputs *in, const node *e) {
    int t = 0, v[6], i = 0;
    const node *n = e->child, *operation = n->next;
    while (strcmp(names[t], n->text)) t++;
    for (n = operation->next; i < 6; n = n->next) v[i++] = (int)n->number;
    float by = real(n);
    const int *s = in->shape[t];
    for (size_t at = 0; at < size(s); at++) {
        int d = (int)(at % (size_t)s[3]), r = (int)(at / (size_t)s[3] % (size_t)s[2]);
        int h = (int)(at / (size_t)s[3] / (size_t)s[2] % (size_t)s[1]);
        int b = (int)(at / size((int[4]){1, s[1], s[2], s[3]}));
        if ((v[0] >= 0 && b != v[0]) || (v[1] >= 0 && h != v[1])) continue;
        if (r < v[2] || r >= v[3] || d < v[4] || d >= v[5]) continue;
        float *x = in->data[t] + at;
        *x = !strcmp(operation->text, "set") ? by : !strcmp(operation->text, "add") ? *x + by : *x * by;
    }
}

static int32_t *integers(const node *n) {
    int32_t *all = n->type == NUL ? NULL : fresh(sizeof *all * (size_t)n->count), *to = all;
    for (const node *x = n->child; x; x = x->next) *to++ = (int32_t)x->number;
    return all;
}

static dsa_config config(const node *c) {
    static const char *const fields[] = {
        "batch", "q_heads", "kv_heads", "q_rows", "k_rows", "dim", "block_q", "block_k", "rank", "dist", "sinks",
        "rule", "min_blocks", "max_blocks", "force_diag", "n_sink", "causal", "q_offset", "select_per_kv",
        "dense_below", "compute"};
    dsa_config made;
    int32_t *to = &made.batch;
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) to[i] = whole(c, fields[i]);
    made.scale = real(get(c, "scale"));
    made.positions = find(c, "positions") ? whole(c, "positions") : 0;
    made.position_bias = NULL;
    return made;
}

static inputs inputs_of(const node *c) {
    inputs in = {.c = config(c)};
    const dsa_config *f = &in.c;
    int shapes[TENSORS][4] = {{f->batch, f->q_heads, f->q_rows, f->dim}, {f->batch, f->kv_heads, f->k_rows, f->dim},
                              {f->batch, f->kv_heads, f->k_rows, f->dim}, {1, f->q_heads, f->dim, f->rank},
                              {1, f->q_heads, f->dim, f->rank}, {1, f->q_heads, 1, 2 * f->dist + 1},
                              {1, f->q_heads, 1, f->sinks}, {1, f->q_heads, 1, 2 * f->positions + 1}};
    memcpy(in.shape, shapes, sizeof shapes);
    uint32_t s = (uint32_t)whole(c, "seed");
    for (int t = 0; t < TENSORS; t++) {
        in.data[t] = fresh(4 * size(shapes[t]));
        for (size_t i = 0; i < size(shapes[t]); i++) {
            s = s * 1664525u + 1013904223u;
            in.data[t][i] = (float)(s >> 8 & 0xffff) / 32768 - 1;
        }
    }
    for (const node *e = get(c, "edits")->child; e; e = e->next) edit(&in, e);
    if (find(c, "positions")) in.c.position_bias = in.data[POSITION];
    const node *theta = get(c, "theta");
    in.theta = fresh(4 * (size_t)theta->count);
    float *to = in.theta;
    for (const node *x = theta->child; x; x = x->next) *to++ = real(x);
    in.q_len = integers(get(c, "q_len"));
    in.kv_len = integers(get(c, "kv_len"));
    return in;
}

/* The same tensor in memory as [batch][row][head][dim] if `bnhd`, under a view that hides it. */
static dsa_tensor view(const inputs *in, int t, int bnhd, float *storage) {
    const int *s = in->shape[t];
    ptrdiff_t head = bnhd ? s[3] : (ptrdiff_t)s[2] * s[3], row = bnhd ? (ptrdiff_t)s[1] * s[3] : s[3];
    dsa_tensor v = {storage, (ptrdiff_t)s[1] * s[2] * s[3], head, row};
    size_t at = 0;
    for (int b = 0; b < s[0]; b++)
        for (int h = 0; h < s[1]; h++)
            for (int r = 0; r < s[2]; r++)
                for (int d = 0; d < s[3]; d++) storage[b * v.batch + h * v.head + r * v.row + d] = in->data[t][at++];
    return v;
}

/* ---- One case. */

static const char *compare_lists(const node *c, const int32_t *idx, const int32_t *cnt, int kmax) {
    for (const node *row = get(c, "lists")->child; row; row = row->next, idx += kmax) {
        const node *x = row->child;
        if (*cnt++ != row->count) return "count";
        for (int i = 0; i < kmax; i++, x = x ? x->next : NULL)
            if (idx[i] != (x ? (int32_t)x->number : -1)) return "list";
    }
    return NULL;
}

static void take_lists(const node *c, int32_t *idx, int32_t *cnt, int kmax) {
    for (const node *row = get(c, "lists")->child; row; row = row->next, idx += kmax) {
        int i = 0;
        *cnt++ = row->count;
        for (const node *x = row->child; x; x = x->next) idx[i++] = (int32_t)x->number;
        for (; i < kmax; i++) idx[i] = -1;
    }
}

/* out is [batch][head][row][dim] whatever the inputs' layout. */
static const char *compare_output(const node *c, const float *out) {
    double error = 0, total = 0, most = 0;
    const node *want = get(c, "out")->child;
    for (const node *at = get(c, "at")->child; at; at = at->next, want = want->next) {
        double x = (double)out[(size_t)at->number], y = (double)real(want);
        if (isnan(x) != isnan(y)) return "NaN";
        if (isnan(x)) continue;
        error += (x - y) * (x - y);
        total += y * y;
        most = fmax(most, fabs(x - y));
    }
    if (whole(c, "compute")) return sqrt(error) <= 3e-2 * sqrt(total) ? NULL : "int8 output";
    return most <= 5e-6 * get(c, "max_v")->number ? NULL : "output";
}

static const char *run_case(const node *c) {
    inputs in = inputs_of(c);
    const dsa_config *f = &in.c;
    int bnhd = whole(c, "bnhd"), kmax = dsa_kmax(f), foreign = !strncmp(get(c, "name")->text, "lists-", 6);
    size_t rows = (size_t)get(c, "lists")->count, n = size(in.shape[Q]), bytes = dsa_workspace(f, 1);
    int32_t *idx = fresh(4 * rows * (size_t)kmax), *cnt = fresh(4 * rows);
    float *out = fresh(4 * n), *fused = fresh(4 * n), *spare = fresh(4 * (n + 2 * size(in.shape[K])));
    char *work = fresh(bytes + 1);
    dsa_tensor q = view(&in, Q, bnhd, spare), k = view(&in, K, bnhd, spare + n);
    dsa_tensor v = view(&in, V, bnhd, spare + n + size(in.shape[K]));
    dsa_scorer s = {in.data[WQ], in.data[WK], in.data[DIST], in.data[SINK], in.theta};
    dsa_lengths len = {in.q_len, in.kv_len};
    const ptrdiff_t strides[3] = {(ptrdiff_t)f->q_heads * f->q_rows * f->dim, (ptrdiff_t)f->q_rows * f->dim, f->dim};
    const char *wrong = dsa_why(f);
    work[bytes] = 42;
    if (!wrong && foreign) take_lists(c, idx, cnt, kmax);
    if (!wrong && !foreign) {
        if (dsa_select(f, q, k, &s, len, work, bytes, NULL, idx, cnt)) return "select refused";
        wrong = compare_lists(c, idx, cnt, kmax);
    }
    if (!wrong && dsa_attend(f, q, k, v, idx, cnt, len, work, bytes, NULL, out, strides)) return "attend refused";
    if (!wrong) wrong = compare_output(c, out);
    if (!wrong && !foreign) {
        if (dsa_fused(f, q, k, v, &s, len, work, bytes, NULL, fused, strides, NULL)) return "fused refused";
        if (memcmp(out, fused, 4 * n)) wrong = "fused differs from attend(select)";
    }
    if (!wrong && work[bytes] != 42) wrong = "workspace overrun";
    void *all[] = {idx, cnt, out, fused, spare, work, in.theta, in.q_len, in.kv_len};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    for (int t = 0; t < TENSORS; t++) free(in.data[t]);
    return wrong;
}

node *root; /* global: still reachable when the leak checker looks */

static int run_set(const char *set) {
    const node *const lists[] = {get(root, "cases"), get(root, "biased")};
    int failed = 0, count = 0;
    if (!dsa_limit(set)) {
        printf("%s: this CPU cannot run it\n", set);
        return 0;
    }
    for (int l = 0; l < 2; l++)
        for (const node *c = lists[l]->child; c; c = c->next, count++) {
            const char *wrong = run_case(c);
            if (wrong) printf("%s: %s: wrong %s\n", set, get(c, "name")->text, wrong);
            failed += wrong != NULL;
        }
    if (strcmp(dsa_kernels(), set)) failed++;
    printf("%s: %d of %d cases ok\n", set, count - failed, count);
    return failed;
}

int main(int argc, char **argv) {
    static char text[1 << 20], *p = text;
    FILE *f = argc > 1 ? fopen(argv[1], "rb") : NULL;
    if (!f || fread(text, 1, sizeof text - 1, f) == 0) return 2;
    root = value(&p);
    int failed = 0;
    printf("best: %s\n", dsa_kernels());
    if (argc > 2) return run_set(argv[2]) != 0;
#define DSA_KERNELS(name, needs, flags) failed += run_set(#name);
#include "kernels.inc"
    return failed != 0;
}
