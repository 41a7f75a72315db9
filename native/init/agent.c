/* The agent's life: its spec, its start in a session of its own, its end and what it leaves behind. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "init.h"
#include "spec.h"

extern char **environ;

/* Where the child failed, as it says so through the pipe that a successful exec closes. */
struct failure {
    int error;
    enum { AT_SESSION, AT_CWD, AT_EXEC } step;
};

void agent_spec_piece(struct init *init, uint64_t offset, const uint8_t *bytes, size_t len) {
    struct agent *agent = &init->agent;
    if (agent->phase == PHASE_RUNNING || agent->phase == PHASE_EXITED) return;
    if (offset == 0) agent->spec_bytes = 0; /* a host that starts anew */
    if (offset != agent->spec_bytes || len > SPEC_BYTES_MAX - agent->spec_bytes) return;
    if (!agent->spec && !(agent->spec = malloc(SPEC_BYTES_MAX))) return;
    if (len > 0) memcpy(agent->spec + agent->spec_bytes, bytes, len);
    agent->spec_bytes += len;
}

void child_reset_signals(void) {
    struct sigaction by_default = {.sa_handler = SIG_DFL};
    for (int number = 1; number < NSIG; number++) sigaction(number, &by_default, NULL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static _Noreturn void child_fails(int report_fd, int step) {
    struct failure failure = {.error = errno, .step = step};
    ssize_t put = write(report_fd, &failure, sizeof failure);
    _exit(put == sizeof failure ? 127 : 126);
}

static _Noreturn void become_agent(const struct spec *spec, int out_fd, int error_fd, int report_fd) {
    child_reset_signals();
    int null_fd = open("/dev/null", O_RDONLY);
    if (setsid() < 0 || null_fd < 0 || dup2(null_fd, 0) < 0 || dup2(out_fd, 1) < 0 || dup2(error_fd, 2) < 0)
        child_fails(report_fd, AT_SESSION);
    if (null_fd > 2) close(null_fd);
    if (chdir(spec->cwd) < 0) child_fails(report_fd, AT_CWD);
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* as in a sandbox, where nothing outlives PID 1 */
    environ = spec->environment; /* execvp searches the agent's PATH, not ours */
    execvp(spec->args[0], spec->args);
    child_fails(report_fd, AT_EXEC);
}

static void start_failed(struct init *init, int error, const char *what, const char *which) {
    struct agent *agent = &init->agent;
    agent->phase = PHASE_NOT_STARTED;
    agent->start_errno = (uint32_t)(error ? error : EINVAL);
    snprintf(agent->start_error, sizeof agent->start_error, "cannot %s %.160s: %s", what, which,
             strerror((int)agent->start_errno));
    agent->owes_started = true;
}

static void close_all(const int *fds, int count) {
    for (int i = 0; i < count; i++)
        if (fds[i] >= 0) close(fds[i]);
}

/* Waits for the exec or for its failure. The pipe is the child's alone, so it ends with one of the two. */
static void await_exec(struct init *init, const struct spec *spec, pid_t pid, int report_fd) {
    static const char *const steps[] = {"make a session for", "enter the working directory", "run"};
    struct failure failure;
    ssize_t got;
    do got = read(report_fd, &failure, sizeof failure);
    while (got < 0 && errno == EINTR);
    if (got == sizeof failure) {
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR) continue;
        const char *which = failure.step == AT_CWD ? spec->cwd : spec->args[0];
        start_failed(init, failure.error, steps[failure.step], which);
        return;
    }
    init->agent.phase = PHASE_RUNNING;
    init->agent.pid = pid;
    init->agent.start_errno = 0;
    init->agent.start_error[0] = 0;
    init->agent.owes_started = true;
}

static void spawn(struct init *init, const struct spec *spec) {
    enum { OUT, OUT_END, ERR, ERR_END, REPORT, REPORT_END, PIPE_ENDS };
    int fds[PIPE_ENDS] = {-1, -1, -1, -1, -1, -1};
    bool piped = pipe2(fds + OUT, O_CLOEXEC) == 0 && pipe2(fds + ERR, O_CLOEXEC) == 0 &&
                 pipe2(fds + REPORT, O_CLOEXEC) == 0 && fcntl(fds[OUT], F_SETFL, O_NONBLOCK) == 0 &&
                 fcntl(fds[ERR], F_SETFL, O_NONBLOCK) == 0;
    pid_t pid = piped ? fork() : -1;
    if (pid == 0) become_agent(spec, fds[OUT_END], fds[ERR_END], fds[REPORT_END]);
    if (pid < 0) {
        start_failed(init, errno, "start a process for", spec->args[0]);
        close_all(fds, PIPE_ENDS);
        return;
    }
    close_all((int[]){fds[OUT_END], fds[ERR_END], fds[REPORT_END]}, 3);
    await_exec(init, spec, pid, fds[REPORT]);
    close(fds[REPORT]);
    if (init->agent.phase == PHASE_RUNNING) {
        stream_open_output(&init->streams, STREAM_STDOUT, fds[OUT]);
        stream_open_output(&init->streams, STREAM_STDERR, fds[ERR]);
    } else {
        close_all((int[]){fds[OUT], fds[ERR]}, 2);
    }
}

void agent_start(struct init *init, uint64_t spec_bytes) {
    struct agent *agent = &init->agent;
    struct spec spec = {0};
    bool whole = agent->spec && agent->spec_bytes == spec_bytes;
    if (whole && spec_parse(agent->spec, agent->spec_bytes, &spec))
        spawn(init, &spec);
    else
        start_failed(init, EINVAL, "read", "the agent's spec");
    free(spec.pointers);
    free(agent->spec);
    agent->spec = NULL;
    agent->spec_bytes = 0;
}

void agent_signal(struct init *init, int signal_number) {
    if (init->agent.phase != PHASE_RUNNING || init->agent.ended) return;
    if (signal_number < 1 || signal_number >= NSIG) return;
    kill(-init->agent.pid, signal_number);
}

/* As PID 1 everything else in the sandbox is the agent's. Anywhere else only its process group is known to be. */
static void kill_stragglers(const struct init *init) {
    kill(getpid() == 1 ? -1 : -init->agent.pid, SIGKILL);
}

void agent_reaped(struct init *init, pid_t pid, int wait_status) {
    struct agent *agent = &init->agent;
    if (agent->phase != PHASE_RUNNING || agent->ended || pid != agent->pid) return;
    agent->ended = true;
    agent->ended_ms = now_ms();
    agent->wait_status = wait_status;
    /* What it wrote stays in its pipes; what it left running must not go on writing to them or to the workspace. */
    kill_stragglers(init);
}

/* True when no process of the sandbox but init is left, or none can be waited for any longer. */
static bool stragglers_are_gone(const struct init *init) {
    if (getpid() != 1) return true;
    siginfo_t info;
    if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) < 0 && errno == ECHILD) return true;
    kill_stragglers(init); /* one may have been forked during the last round */
    return now_ms() - init->agent.ended_ms > REAP_MS_MAX;
}

void agent_wind_up(struct init *init) {
    struct agent *agent = &init->agent;
    if (!agent->ended || agent->phase != PHASE_RUNNING || init->barrier != BARRIER_NONE) return;
    if (!stragglers_are_gone(init)) return;
    bool drained = true;
    for (int i = 0; i < OUTPUTS; i++) drained &= relay_drain_output(init, &init->streams.slot[i]);
    if (!drained) return;
    for (int i = 0; i < OUTPUTS; i++) {
        struct stream *output = &init->streams.slot[i];
        if (output->fd < 0) continue;
        close(output->fd); /* held open by a process outside of our reach: only outside of a sandbox */
        output->fd = -1;
        output->watched = false;
        output->at_end = output->ended = output->owes_fin = true;
    }
    agent->phase = PHASE_EXITED;
    agent->owes_exit = true;
}
