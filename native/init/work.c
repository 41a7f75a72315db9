/* Starts workers and gives each a stream. A stream of a worker is credited and sent like a call's, and lasts as long as
 * the link: the host, which numbered it, is the only one that can say what it was for. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "init.h"
#include "record.h"

static const char *const workers[] = {"torpor-exec", "torpor-copy-out", "torpor-copy-in", "torpor-prepare"};

static const char *find_worker(const uint8_t *name, size_t len) {
    for (size_t i = 0; i < sizeof workers / sizeof *workers; i++)
        if (len == strlen(workers[i]) && memcmp(name, workers[i], len) == 0) return workers[i];
    return NULL;
}

static bool was_asked_before(struct work *work, uint64_t request_id) {
    for (unsigned i = 0; i < WORK_IDS_KEPT; i++)
        if (work->ids[i] == request_id) return true;
    work->ids[work->next++ % WORK_IDS_KEPT] = request_id;
    return false;
}

static _Noreturn void become_worker(const char *program, const char *name, const char *run_dir, int socket_fd) {
    char *args[] = {(char *)name, (char *)run_dir, NULL}, *environment[] = {NULL};
    child_reset_signals();
    int null_fd = open("/dev/null", O_RDWR);
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (setsid() < 0 || null_fd < 0 || dup2(socket_fd, 0) < 0 || dup2(null_fd, 1) < 0 || dup2(null_fd, 2) < 0)
        _exit(126);
    /* Not /proc/self/exe: gVisor keeps what /proc has of a process that was looked up there, 45 KB, in the image too. */
    execve(program, args, environment);
    _exit(127);
}

/* The worker's socket, or -1 and errno. */
static int start_worker(const struct options *options, const char *name) {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) return -1;
    pid_t pid = fcntl(ends[0], F_SETFL, O_NONBLOCK) < 0 ? -1 : fork();
    if (pid == 0) become_worker(options->program, name, options->run_dir, ends[1]);
    int error = errno;
    close(ends[1]);
    if (pid > 0) return ends[0];
    close(ends[0]);
    errno = error;
    return -1;
}

static void end(struct stream *stream) {
    stream->ending = ENDING_GONE;
    stream->owes_closed = true;
}

/* The stream exists even so: its only record says why there is no worker. */
static void refuse(struct init *init, struct stream *stream, int error, const char *reason) {
    uint8_t record[RECORD_HEADER_BYTES + 1024];
    size_t len = record_failure(error, reason, record);
    (void)request_put(&init->streams, stream, record, len); /* without room the bare end has to say it */
    end(stream);
}

/* Most agents have no hooks, and no process is started for them. */
static bool has_hooks(const struct init *init) {
    char path[RUN_PATH_MAX], *names[HOOKS_MAX];
    unsigned count = run_path(init, HOOKS_BEFORE_CHECKPOINT, path) ? hooks_list(path, names) : 0;
    for (unsigned i = 0; i < count; i++) free(names[i]);
    return count > 0;
}

void work_open(struct init *init, uint32_t stream_id, uint64_t request_id, const uint8_t *name, size_t name_bytes) {
    struct stream *stream = stream_open_worker(&init->streams, stream_id, -1);
    if (!stream) {
        log_line(init, "cannot open stream %u for a worker", stream_id);
        return;
    }
    const char *worker = find_worker(name, name_bytes);
    if (!worker)
        refuse(init, stream, ENOSYS, "this init has no such worker");
    else if (init->agent.phase != PHASE_RUNNING || init->agent.ended)
        refuse(init, stream, ESRCH, "the agent does not run");
    else if (was_asked_before(&init->work, request_id))
        refuse(init, stream, EALREADY, "this was asked before");
    else if (strcmp(worker, "torpor-prepare") == 0 && !has_hooks(init))
        end(stream);
    else if ((stream->fd = start_worker(&init->options, worker)) < 0)
        refuse(init, stream, errno, "cannot start a process");
}

void work_drop_all(struct init *init) {
    for (int i = CALLS_END; i < STREAMS_MAX; i++) {
        struct stream *stream = &init->streams.slot[i];
        if (!stream->used) continue;
        if (stream->ending == ENDING_NONE) relay_close(stream, ENDING_RESET);
        stream_forget(&init->streams, stream);
    }
}
