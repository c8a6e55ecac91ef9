/* A QEMU plugin: executed vector fused multiply-adds of an AArch64 program, printed as one number to stderr at exit.
 * QEMU's own header is not needed: what is used of plugin interface 1 is declared here. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))
struct tb;
struct insn;
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*translated)(uint64_t id, struct tb *tb));
void qemu_plugin_register_atexit_cb(uint64_t id, void (*done)(uint64_t id, void *data), void *data);
void qemu_plugin_register_vcpu_insn_exec_inline(struct insn *insn, int operation, void *counter, uint64_t by);
size_t qemu_plugin_tb_n_insns(const struct tb *tb);
struct insn *qemu_plugin_tb_get_insn(const struct tb *tb, size_t i);
const void *qemu_plugin_insn_data(const struct insn *insn);
PUBLIC int qemu_plugin_version = 1;

static uint64_t count;

/* FMLA (vector) and FMLA (by element), single precision, from the A64 encoding tables. */
static int is_fmla(uint32_t word) { return (word & 0xbfe0fc00) == 0x0e20cc00 || (word & 0xbfc0f400) == 0x0f801000; }

static void translated(uint64_t id, struct tb *tb) {
    (void)id;
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++) {
        struct insn *insn = qemu_plugin_tb_get_insn(tb, i);
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(insn), 4);
        if (is_fmla(word)) qemu_plugin_register_vcpu_insn_exec_inline(insn, 0 /* add */, &count, 1);
    }
}

static void done(uint64_t id, void *data) {
    (void)id, (void)data;
    fprintf(stderr, "fmla %llu\n", (unsigned long long)count);
}

PUBLIC int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv) {
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, done, NULL);
    return 0;
}
