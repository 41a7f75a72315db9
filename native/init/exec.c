/* torpor-exec: runs one program with its stdin, stdout and stderr on the worker's socket, and tells how it ended.
 *
 *   host -> worker   P spec piece, G go, I stdin (empty: its end), S u32 signal
 *   worker -> host   W u32 stdin bytes that the program took, O stdout, E stderr, X i32 wait status, F failure
 *
 * The host sends at most STDIN_WINDOW_BYTES that were not taken, so a signal is never stuck behind stdin. When the host
 * is gone the program lives on: its stdin ends, and what it writes is read and dropped. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bytes.h"
#include "record.h"
#include "spec.h"
#include "worker.h"

enum { STDIN_WINDOW_BYTES = 65536, SOCKET_FD = 0, CHANNELS = 2, FAILED_AT_EXEC = 127 };

struct exec {
    struct record_reader reader;
    uint8_t *spec;
    size_t spec_bytes;
    pid_t pid; /* 0: not started */
    bool ended, told, hung_up, shut;
    int wait_status;
    int in_fd;
    uint8_t in[STDIN_WINDOW_BYTES];
    size_t in_start, in_end;
    bool in_ends;
    uint32_t owed_window;
    int channel_fd[CHANNELS]; /* stdout, stderr; -1 at their end */
    int left[CHANNELS]; /* once the program has ended: bytes that may be its own; others may hold the pipes still */
    unsigned turn;
    uint8_t out[RECORD_BYTES_MAX];
    size_t out_start, out_end;
};

static volatile sig_atomic_t child_ended;

static void on_child(int number) {
    (void)number;
    child_ended = 1;
}

static void close_fd(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

static void fail(struct exec *exec, int error, const char *text) {
    exec->out_end = record_failure(error, text, exec->out);
    exec->out_start = 0;
    exec->told = exec->ended = true;
}

static void hang_up(struct exec *exec) {
    exec->hung_up = exec->in_ends = true;
    exec->out_start = exec->out_end = 0;
    int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null_fd >= 0) dup3(null_fd, SOCKET_FD, O_CLOEXEC); /* the number must not go to something else */
    close_fd(&null_fd);
}

static _Noreturn void become_program(const struct spec *spec, const int fds[3], int report_fd) {
    struct sigaction by_default = {.sa_handler = SIG_DFL};
    for (int number = 1; number < NSIG; number++) sigaction(number, &by_default, NULL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    bool ready = setsid() >= 0;
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* as in a sandbox, where nothing outlives PID 1 */
    for (int i = 0; i < 3; i++) ready = ready && dup2(fds[i], i) >= 0;
    if (ready && chdir(spec->cwd) == 0) {
        environ = spec->environment; /* execvp searches the program's PATH */
        execvp(spec->args[0], spec->args);
    }
    int error = errno;
    ssize_t put = write(report_fd, &error, sizeof error);
    _exit(put == sizeof error ? FAILED_AT_EXEC : 126);
}

/* 0 once the program runs, else its errno. */
static int await_exec(struct exec *exec, int report_fd) {
    int error = 0;
    ssize_t got;
    do got = read(report_fd, &error, sizeof error);
    while (got < 0 && errno == EINTR);
    if (got != sizeof error) return 0;
    while (waitpid(exec->pid, NULL, 0) < 0 && errno == EINTR) continue;
    exec->pid = 0;
    return error;
}

static int start_program(struct exec *exec, const struct spec *spec) {
    enum { IN_END, IN, OUT, OUT_END, ERR, ERR_END, REPORT, REPORT_END, PIPE_ENDS };
    int fds[PIPE_ENDS], error = 0;
    for (int i = 0; i < PIPE_ENDS; i++) fds[i] = -1;
    for (int i = 0; i < PIPE_ENDS && !error; i += 2)
        if (pipe2(fds + i, O_CLOEXEC) < 0) error = errno;
    const int ours[] = {IN, OUT, ERR};
    for (int i = 0; i < 3 && !error; i++)
        if (fcntl(fds[ours[i]], F_SETFL, O_NONBLOCK) < 0) error = errno;
    exec->pid = error ? -1 : fork();
    if (exec->pid == 0) become_program(spec, (int[]){fds[IN_END], fds[OUT_END], fds[ERR_END]}, fds[REPORT_END]);
    if (exec->pid < 0) error = error ? error : errno;
    const int theirs[] = {IN_END, OUT_END, ERR_END, REPORT_END};
    for (int i = 0; i < 4; i++) close_fd(&fds[theirs[i]]);
    if (!error) error = await_exec(exec, fds[REPORT]);
    close_fd(&fds[REPORT]);
    for (int i = 0; i < 3 && error; i++) close_fd(&fds[ours[i]]);
    exec->in_fd = fds[IN];
    exec->channel_fd[0] = fds[OUT];
    exec->channel_fd[1] = fds[ERR];
    return error;
}

static void go(struct exec *exec) {
    struct spec spec = {0};
    int error = EINVAL;
    char text[512] = "cannot read what is to be run";
    if (exec->spec && spec_parse(exec->spec, exec->spec_bytes, &spec)) {
        error = start_program(exec, &spec);
        snprintf(text, sizeof text, "cannot run %.160s in %.160s: %s", spec.args[0], spec.cwd, strerror(error));
    }
    free(spec.pointers);
    free(exec->spec);
    exec->spec = NULL;
    if (error) fail(exec, error, text);
}

static bool take_spec(struct exec *exec, const uint8_t *bytes, size_t len) {
    if (exec->pid || len > SPEC_BYTES_MAX - exec->spec_bytes) return false;
    if (!exec->spec && !(exec->spec = malloc(SPEC_BYTES_MAX))) return false;
    memcpy(exec->spec + exec->spec_bytes, bytes, len);
    exec->spec_bytes += len;
    return true;
}

static bool take_stdin(struct exec *exec, const uint8_t *bytes, size_t len) {
    if (len == 0) {
        exec->in_ends = true;
        return true;
    }
    if (exec->in_fd < 0 || exec->in_ends) { /* nobody reads it */
        exec->owed_window += (uint32_t)len;
        return true;
    }
    if (len > sizeof exec->in - (exec->in_end - exec->in_start)) return false; /* beyond the window */
    memmove(exec->in, exec->in + exec->in_start, exec->in_end - exec->in_start);
    exec->in_end -= exec->in_start;
    exec->in_start = 0;
    memcpy(exec->in + exec->in_end, bytes, len);
    exec->in_end += len;
    return true;
}

static bool on_record(void *context, uint8_t type, const uint8_t *payload, size_t len) {
    struct exec *exec = context;
    switch (type) {
    case 'P': return take_spec(exec, payload, len);
    case 'G':
        if (exec->pid || exec->told) return false;
        go(exec);
        return true;
    case 'I': return take_stdin(exec, payload, len);
    case 'S':
        if (len == 4 && exec->pid > 0 && !exec->ended) kill(-exec->pid, (int)get_u32(payload));
        return true;
    default: return true; /* a later version's */
    }
}

static void read_socket(struct exec *exec) {
    static uint8_t bytes[65536];
    ssize_t got = recv(SOCKET_FD, bytes, sizeof bytes, MSG_DONTWAIT);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) return;
    if (got > 0 && (exec->shut || record_reader_feed(&exec->reader, bytes, (size_t)got, on_record, exec))) return;
    hang_up(exec);
}

static void write_stdin(struct exec *exec) {
    while (exec->in_fd >= 0 && exec->in_start < exec->in_end) {
        ssize_t put = write(exec->in_fd, exec->in + exec->in_start, exec->in_end - exec->in_start);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0 && errno == EAGAIN) return;
        if (put < 0) { /* the program reads no more */
            exec->owed_window += (uint32_t)(exec->in_end - exec->in_start);
            exec->in_start = exec->in_end = 0;
            close_fd(&exec->in_fd);
            return;
        }
        exec->in_start += (size_t)put;
        exec->owed_window += (uint32_t)put;
    }
    if (exec->in_ends) close_fd(&exec->in_fd);
}

/* Reads a piece of a channel straight into a record, or drops it when nobody is told any more; false: nothing to send. */
static bool fill_from(struct exec *exec, unsigned channel) {
    int *fd = &exec->channel_fd[channel];
    if (*fd < 0) return false;
    ssize_t got = read(*fd, exec->out + RECORD_HEADER_BYTES, RECORD_PAYLOAD_MAX);
    bool later = got < 0 && (errno == EINTR || errno == EAGAIN);
    if (exec->ended && !(got < 0 && errno == EINTR)) exec->left[channel] -= later ? exec->left[channel] : (int)got;
    if (got <= 0 && !later) close_fd(fd);
    if (got <= 0 || exec->hung_up || exec->told) return false;
    exec->out_end = record_encode("OE"[channel], exec->out + RECORD_HEADER_BYTES, (size_t)got, exec->out);
    return true;
}

static bool has_told_all(const struct exec *exec) {
    for (int i = 0; i < CHANNELS; i++)
        if (exec->channel_fd[i] >= 0 && exec->left[i] > 0) return false;
    return exec->ended;
}

/* The next record to send, if there is one: windows first, then the channels in turn, the end last. */
static void fill_out(struct exec *exec) {
    uint8_t number[4];
    exec->out_start = exec->out_end = 0;
    if (exec->owed_window && !exec->hung_up && !exec->told) {
        put_u32(number, exec->owed_window);
        exec->owed_window = 0;
        exec->out_end = record_encode('W', number, sizeof number, exec->out);
        return;
    }
    unsigned first = exec->turn++ % CHANNELS;
    if (!exec->told && has_told_all(exec)) {
        put_u32(number, (uint32_t)exec->wait_status);
        exec->told = true;
        if (!exec->hung_up) exec->out_end = record_encode('X', number, sizeof number, exec->out);
        return;
    }
    (void)(fill_from(exec, first) || fill_from(exec, !first));
}

static bool flush(struct exec *exec) {
    while (exec->out_start < exec->out_end) {
        ssize_t put = send(SOCKET_FD, exec->out + exec->out_start, exec->out_end - exec->out_start,
                           MSG_DONTWAIT | MSG_NOSIGNAL);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0 && errno == EAGAIN) return false;
        if (put < 0) {
            hang_up(exec);
            return true;
        }
        exec->out_start += (size_t)put;
    }
    return true;
}

static void send_what_is_there(struct exec *exec) {
    while (flush(exec)) {
        fill_out(exec);
        if (exec->out_start == exec->out_end && !(exec->ended && !exec->told)) break;
    }
    if (!exec->told || exec->shut || exec->hung_up || exec->out_start < exec->out_end) return;
    shutdown(SOCKET_FD, SHUT_WR); /* and then the host closes */
    exec->shut = true;
}

static void reap(struct exec *exec) {
    if (!child_ended) return;
    child_ended = 0;
    if (exec->pid <= 0 || exec->ended || waitpid(exec->pid, &exec->wait_status, WNOHANG) != exec->pid) return;
    exec->ended = true;
    for (int i = 0; i < CHANNELS; i++)
        if (exec->channel_fd[i] >= 0 && ioctl(exec->channel_fd[i], FIONREAD, &exec->left[i]) < 0) exec->left[i] = 65536;
}

static bool is_over(const struct exec *exec) {
    bool drained = exec->channel_fd[0] < 0 && exec->channel_fd[1] < 0;
    return exec->hung_up && (exec->pid <= 0 || exec->ended) && drained;
}

static void wait_for_something(struct exec *exec, const sigset_t *signals) {
    bool full = exec->out_start < exec->out_end;
    struct pollfd fds[4] = {{.fd = exec->hung_up ? -1 : SOCKET_FD, .events = (short)(POLLIN | (full ? POLLOUT : 0))},
                            {.fd = exec->in_start < exec->in_end ? exec->in_fd : -1, .events = POLLOUT}};
    for (int i = 0; i < CHANNELS; i++)
        fds[2 + i] = (struct pollfd){.fd = full ? -1 : exec->channel_fd[i], .events = POLLIN};
    if (ppoll(fds, 4, NULL, signals) < 0) return;
    if (fds[0].revents & (POLLIN | POLLHUP | POLLERR)) read_socket(exec);
}

int exec_main(int argc, char **argv) {
    (void)argc, (void)argv; /* what to run comes over the socket */
    static struct exec exec = {.in_fd = -1, .channel_fd = {-1, -1}};
    struct sigaction action = {.sa_handler = on_child};
    sigset_t blocked, before;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGCHLD);
    sigprocmask(SIG_BLOCK, &blocked, &before);
    sigdelset(&before, SIGCHLD);
    sigaction(SIGCHLD, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    fcntl(SOCKET_FD, F_SETFD, FD_CLOEXEC);
    while (!is_over(&exec)) {
        write_stdin(&exec);
        reap(&exec);
        send_what_is_there(&exec);
        if (!is_over(&exec)) wait_for_something(&exec, &before);
    }
    return 0;
}
