/* torpor-init, PID 1 of every sandbox: the options and the event loop. The contract is docs/init-protocol.md.
 *
 * One thread sleeps in epoll. Each round it takes what is there, turns its duties into frames, and then says to epoll
 * what it waits for next. The clock is looked at only for a host that is away, for hooks and for leftovers. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "crc32c.h"
#include "guest.h"
#include "init.h"
#include "worker.h"

enum { EVENTS_MAX = 64, TICK_MS = 50, EXIT_USAGE = 2 };

static volatile sig_atomic_t child_ended, asked_to_end; /* the signal's number */

int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void log_line(struct init *init, const char *format, ...) {
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int len = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (len < 0) return;
    size_t bytes = ((size_t)len < sizeof line ? (size_t)len : sizeof line - 1) + 1;
    if (bytes > sizeof init->log - init->log_bytes) return; /* the first lines tell more than the last */
    memcpy(init->log + init->log_bytes, line, bytes);
    init->log_bytes += bytes;
}

static _Noreturn void usage(void) {
    fprintf(stderr, "usage: torpor-init [--listen ADDR:PORT]... [--run-dir DIR] [--request-bytes-max N] "
                    "[--total-bytes-max N]\n");
    exit(EXIT_USAGE);
}

static void add_listen(struct options *options, const char *text) {
    char address[INET_ADDRSTRLEN];
    const char *colon = strrchr(text, ':');
    if (!colon || (size_t)(colon - text) >= sizeof address || options->listen_count == LISTENERS_MAX) usage();
    memcpy(address, text, (size_t)(colon - text));
    address[colon - text] = 0;
    char *rest;
    unsigned long port = strtoul(colon + 1, &rest, 10);
    struct sockaddr_in *listen = &options->listen[options->listen_count++];
    listen->sin_family = AF_INET;
    listen->sin_port = htons((uint16_t)port);
    if (!colon[1] || *rest || port > UINT16_MAX || inet_pton(AF_INET, address, &listen->sin_addr) != 1) usage();
}

static uint64_t parse_bytes(const char *text) {
    char *rest;
    errno = 0;
    unsigned long long value = strtoull(text, &rest, 10);
    if (text[0] < '0' || text[0] > '9' || *rest || errno) usage();
    return value;
}

static void parse_options(struct options *options, int argc, char **argv) {
    options->run_dir = "/run/torpor";
    options->request_bytes_max = 64ull << 20;
    options->total_bytes_max = 256ull << 20;
    for (int i = 1; i < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        if (!value) usage();
        if (!strcmp(name, "--listen"))
            add_listen(options, value);
        else if (!strcmp(name, "--run-dir"))
            options->run_dir = value;
        else if (!strcmp(name, "--request-bytes-max"))
            options->request_bytes_max = parse_bytes(value);
        else if (!strcmp(name, "--total-bytes-max"))
            options->total_bytes_max = parse_bytes(value);
        else
            usage();
    }
    if (options->listen_count > 0) return;
    add_listen(options, "127.0.0.1:4100");
    add_listen(options, "127.0.0.1:4101");
}

/* Once: what it is started from stays where it is, in every life. */
static void find_program(struct options *options) {
    ssize_t len = readlink("/proc/self/exe", options->program, sizeof options->program - 1);
    options->program[len > 0 ? len : 0] = 0;
}

static void on_signal(int number) {
    if (number == SIGCHLD)
        child_ended = 1;
    else
        asked_to_end = number;
}

/* Blocked except while epoll waits, so that no signal comes between looking and sleeping. */
static void take_signals(void) {
    struct sigaction action = {.sa_handler = on_signal};
    sigset_t ours;
    sigemptyset(&ours);
    const int numbers[] = {SIGCHLD, SIGTERM, SIGINT};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        sigaddset(&ours, numbers[i]);
        sigaction(numbers[i], &action, NULL);
    }
    sigprocmask(SIG_BLOCK, &ours, NULL);
    signal(SIGPIPE, SIG_IGN);
}

static void handle_signals(struct init *init) {
    if (asked_to_end) {
        agent_signal(init, asked_to_end);
        asked_to_end = 0;
    }
    if (!child_ended) return;
    child_ended = 0;
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0 || (pid < 0 && errno == EINTR)) {
        if (pid < 0) continue;
        agent_reaped(init, pid, status);
        restore_reaped(init, pid);
    }
}

static bool winding_up(const struct init *init) {
    return init->agent.ended && init->agent.phase == PHASE_RUNNING;
}

static void sooner(int *timeout_ms, int64_t ms) {
    if (ms < 0) ms = 0;
    if (*timeout_ms < 0 || ms < *timeout_ms) *timeout_ms = (int)ms;
}

static int timeout_ms(const struct init *init) {
    int timeout = -1;
    if (link_needs_retry(&init->link)) sooner(&timeout, LINK_AWAY_RETRY_MS);
    if (relay_needs_retry(init)) sooner(&timeout, SETTLE_RETRY_MS);
    if (init->lack_until_ms) sooner(&timeout, init->lack_until_ms - now_ms());
    if (init->restore.hook_pid) sooner(&timeout, init->restore.hook_deadline_ms - now_ms());
    if (winding_up(init) && init->barrier == BARRIER_NONE) sooner(&timeout, REAP_RETRY_MS);
    return timeout;
}

static void handle_event(struct init *init, const struct epoll_event *event) {
    uint32_t which = (uint32_t)event->data.u64;
    switch (event->data.u64 >> 32) {
    case TAG_LINK_IN: link_receive(&init->link, host_frame, init); break;
    case TAG_LISTENER: relay_accept(init, &init->listeners[which]); break;
    case TAG_STREAM: {
        struct stream *stream = stream_find(&init->streams, which);
        if (stream) relay_event(init, stream, event->events);
        break;
    }
    default: break; /* TAG_LINK_OUT: every round flushes */
    }
}

static void tick(struct init *init) {
    if (link_needs_retry(&init->link)) link_receive(&init->link, host_frame, init);
    if (now_ms() >= init->lack_until_ms) init->lack_until_ms = 0;
    relay_retry(init);
    restore_tick(init);
}

static void send_what_is_owed(struct init *init) {
    for (;;) {
        report_pump(init);
        if (link_is_empty(&init->link)) return;
        link_flush(&init->link);
        if (!link_is_empty(&init->link)) return; /* the FIFO is full or has no reader; link_flush saw to the waking */
    }
}

static void run(struct init *init) {
    struct epoll_event events[EVENTS_MAX];
    sigset_t none;
    int64_t ticked_ms = now_ms();
    sigemptyset(&none);
    while (!init->exit_acked) {
        relay_watch(init);
        int count = epoll_pwait(init->epoll_fd, events, EVENTS_MAX, timeout_ms(init), &none);
        handle_signals(init);
        for (int i = 0; i < count; i++) handle_event(init, &events[i]);
        /* By the clock and not for want of events: an agent that is never still must not hide a returning host. */
        if (count <= 0 || now_ms() - ticked_ms >= TICK_MS) {
            tick(init);
            ticked_ms = now_ms();
        }
        agent_wind_up(init);
        send_what_is_owed(init);
    }
}

/* One program, several duties: its name says which. */
static bool has_duty(int argc, char **argv, int *status) {
    static const struct duty {
        const char *name;
        int (*run)(int argc, char **argv);
    } duties[] = {{"torpor-exec", exec_main}, {"torpor-guest", guest_main},
                  {"torpor-copy-out", copy_out_main}, {"torpor-copy-in", copy_in_main},
                  {"torpor-prepare", prepare_main}};
    const char *name = argv[0], *slash = name ? strrchr(name, '/') : NULL;
    if (slash) name = slash + 1;
    for (size_t i = 0; name && i < sizeof duties / sizeof *duties; i++) {
        if (strcmp(name, duties[i].name) != 0) continue;
        *status = duties[i].run(argc, argv);
        return true;
    }
    return false;
}

int main(int argc, char **argv) {
    int status;
    if (has_duty(argc, argv, &status)) return status;
    static struct init init; /* zeroed; too large for a stack */
    parse_options(&init.options, argc, argv);
    find_program(&init.options);
    crc32c_init();
    take_signals();
    prctl(PR_SET_CHILD_SUBREAPER, 1); /* PID 1 is one anyway; elsewhere orphans come to us too */
#ifdef M_MMAP_THRESHOLD
    mallopt(M_MMAP_THRESHOLD, 65536); /* large blocks go back to the kernel when freed, always */
#endif
    streams_init(&init.streams, init.options.request_bytes_max, init.options.total_bytes_max);
    init.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    fcntl(0, F_SETFL, O_NONBLOCK);
    fcntl(1, F_SETFL, O_NONBLOCK);
    if (init.epoll_fd < 0 || !relay_listen(&init)) {
        fprintf(stderr, "torpor-init: cannot listen: %s\n", strerror(errno));
        return 1;
    }
    link_init(&init.link, init.epoll_fd, 0, TAGGED(TAG_LINK_IN, 0), 1, TAGGED(TAG_LINK_OUT, 0));
    run(&init);
    return 0;
}
