/* Incarnations: what init does when the host says that a new life of the sandbox has begun. The files lie where the
 * agent can reach them, so they are opened as things that might be anything. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bytes.h"
#include "hooks.h"
#include "init.h"

enum { RESTORED_HEAD_BYTES = 16 + ENTROPY_BYTES };

bool run_path(const struct init *init, const char *name, char path[RUN_PATH_MAX]) {
    int len = snprintf(path, RUN_PATH_MAX, "%s/%s", init->options.run_dir, name);
    return len > 0 && len < RUN_PATH_MAX;
}

static void make_run_dir(const struct init *init) {
    char path[RUN_PATH_MAX];
    if (!run_path(init, HOOKS_AFTER_RESTORE, path)) return;
    for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        mkdir(path, 0755);
        *slash = '/';
    }
    mkdir(path, 0755);
    if (run_path(init, HOOKS_BEFORE_CHECKPOINT, path)) mkdir(path, 0755);
}

/* A command for the agent: this very program, which goes by the name that it is called by. */
static void link_guest(const struct init *init) {
    char directory[RUN_PATH_MAX], path[RUN_PATH_MAX];
    if (!init->options.program[0] || !run_path(init, "bin", directory) || !run_path(init, "bin/torpor-guest", path))
        return;
    mkdir(directory, 0755);
    unlink(path);
    (void)!symlink(init->options.program, path); /* what the agent has put in its place stays */
}

static bool write_all(int fd, const void *bytes, size_t len) {
    return len == 0 || write(fd, bytes, len) == (ssize_t)len;
}

/* A reader sees the old content or the new, never half of it. */
static void replace_file(struct init *init, const char *name, mode_t mode, const void *bytes, size_t len) {
    char path[RUN_PATH_MAX], temporary[RUN_PATH_MAX], temporary_name[64];
    snprintf(temporary_name, sizeof temporary_name, ".%s.new", name);
    if (!run_path(init, name, path) || !run_path(init, temporary_name, temporary)) return;
    unlink(temporary);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    bool written = fd >= 0 && write_all(fd, bytes, len);
    if (fd >= 0) close(fd);
    if (!written || rename(temporary, path) < 0)
        log_line(init, "cannot write %s: %s", name, strerror(errno));
}

static void append_environment(struct init *init, const uint8_t *changes, size_t len) {
    char path[RUN_PATH_MAX];
    struct stat info;
    if (len == 0 || !run_path(init, "environment", path)) return;
    uint8_t *lines = malloc(len);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0644);
    bool plain = lines && fd >= 0 && fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
    for (size_t i = 0; lines && i < len; i++) lines[i] = changes[i] ? changes[i] : '\n';
    if (!plain || !write_all(fd, lines, len)) log_line(init, "cannot write environment: %s", strerror(errno));
    if (fd >= 0) close(fd);
    free(lines);
}

static void mix_entropy(const uint8_t *entropy) {
    int fd = open("/dev/urandom", O_WRONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return; /* best effort: the file below is what user space can rely on */
    (void)!write(fd, entropy, ENTROPY_BYTES);
    close(fd);
}

void restore_begin(struct init *init, uint64_t incarnation, const uint8_t *entropy) {
    char text[32];
    int len = snprintf(text, sizeof text, "%" PRIu64 "\n", incarnation);
    init->restore.incarnation = incarnation;
    make_run_dir(init);
    link_guest(init);
    replace_file(init, "incarnation", 0644, text, (size_t)len);
    mix_entropy(entropy);
    replace_file(init, "entropy", 0600, entropy, ENTROPY_BYTES);
}

static void drop_hooks(struct restore *restore) {
    if (restore->hook_pid > 0) kill(-restore->hook_pid, SIGKILL);
    for (unsigned i = 0; i < restore->hook_count; i++) free(restore->hooks[i]);
    restore->hook_pid = 0;
    restore->hook_count = restore->hook_next = 0;
}

static void list_hooks(struct init *init) {
    char path[RUN_PATH_MAX];
    if (run_path(init, HOOKS_AFTER_RESTORE, path))
        init->restore.hook_count = hooks_list(path, init->restore.hooks);
}

static bool start_hook(struct init *init, const char *name) {
    struct restore *restore = &init->restore;
    char path[RUN_PATH_MAX], in_dir[512], incarnation[64], slept[64];
    snprintf(in_dir, sizeof in_dir, HOOKS_AFTER_RESTORE "/%s", name);
    snprintf(incarnation, sizeof incarnation, "TORPOR_INCARNATION=%" PRIu64, restore->incarnation);
    snprintf(slept, sizeof slept, "TORPOR_SLEPT_NS=%" PRIu64, restore->slept_ns);
    char *environment[] = {incarnation, slept, HOOKS_PATH, NULL};
    pid_t pid = run_path(init, in_dir, path) ? hooks_start(path, environment) : 0;
    if (pid < 0) log_line(init, "cannot run hook %.100s: %s", name, strerror(errno));
    if (pid <= 0) return false;
    restore->hook_pid = pid;
    restore->hook_deadline_ms = now_ms() + HOOK_MS_MAX;
    return true;
}

/* Starts the next hook, or is done. */
static void go_on(struct init *init) {
    struct restore *restore = &init->restore;
    while (restore->hook_next < restore->hook_count)
        if (start_hook(init, restore->hooks[restore->hook_next++])) return;
    drop_hooks(restore);
    restore->running = false;
    restore->owes_alive = true;
}

void restore_restored(struct init *init, const struct frame *frame) {
    struct restore *restore = &init->restore;
    if (frame->payload_bytes < RESTORED_HEAD_BYTES) return;
    if (frame->arg == restore->incarnation) {
        restore->owes_alive = !restore->running; /* else it follows when the hooks are through */
        return;
    }
    drop_hooks(restore);
    restore->slept_ns = get_u64(frame->payload + 8);
    restore_begin(init, frame->arg, frame->payload + 16);
    append_environment(init, frame->payload + RESTORED_HEAD_BYTES, frame->payload_bytes - RESTORED_HEAD_BYTES);
    list_hooks(init);
    restore->running = true;
    go_on(init);
}

void restore_reaped(struct init *init, pid_t pid) {
    if (init->restore.hook_pid != pid) return;
    init->restore.hook_pid = 0;
    go_on(init);
}

void restore_tick(struct init *init) {
    struct restore *restore = &init->restore;
    if (restore->hook_pid == 0 || now_ms() < restore->hook_deadline_ms) return;
    log_line(init, "hook %.100s took too long", restore->hooks[restore->hook_next - 1]);
    kill(-restore->hook_pid, SIGKILL); /* its group may be there or not yet */
    kill(restore->hook_pid, SIGKILL);
    restore->hook_deadline_ms = now_ms() + HOOK_MS_MAX;
}
