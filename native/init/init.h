/* Everything that PID 1 holds, in one place, and the duties that share it. One thread, one instance. */
#ifndef TORPOR_INIT_H
#define TORPOR_INIT_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "hooks.h"
#include "link.h"
#include "spec.h"
#include "stream.h"

enum {
    PROTOCOL_VERSION = 2,
    LISTENERS_MAX = 8,
    ENTROPY_BYTES = 64,
    RUN_PATH_MAX = 4096,
    LOG_HELD_BYTES_MAX = 8192,
    SETTLE_RETRY_MS = 250, /* a belt for the braces of epoll */
    LACK_RETRY_MS = 50,
    REAP_RETRY_MS = 50,
    REAP_MS_MAX = 5000,
    WORK_IDS_KEPT = 64,
};

/* epoll data: what in the high half, which in the low half. */
enum tag { TAG_LINK_IN = 1, TAG_LINK_OUT, TAG_LISTENER, TAG_STREAM };
#define TAGGED(tag, which) ((uint64_t)(tag) << 32 | (uint32_t)(which))

struct options {
    struct sockaddr_in listen[LISTENERS_MAX];
    unsigned listen_count;
    const char *run_dir;
    char program[RUN_PATH_MAX]; /* its own path; empty: unknown */
    uint64_t request_bytes_max, total_bytes_max;
};

enum phase { PHASE_WAITING = 0, PHASE_RUNNING = 1, PHASE_EXITED = 2, PHASE_NOT_STARTED = 3 };

struct agent {
    uint8_t *spec; /* SPEC_BYTES_MAX, until START */
    size_t spec_bytes;
    enum phase phase;
    pid_t pid;
    bool ended; /* the main process was reaped; output and stragglers may be left */
    int64_t ended_ms;
    int wait_status;
    uint64_t last_signal_id;
    uint32_t start_errno;
    char start_error[256];
    bool owes_started, owes_exit;
};

enum barrier { BARRIER_NONE, BARRIER_FLUSHING, BARRIER_HELD };

struct restore {
    uint64_t incarnation;
    bool running; /* hooks are being run; ALIVE follows */
    uint64_t slept_ns;
    char *hooks[HOOKS_MAX];
    unsigned hook_count, hook_next;
    pid_t hook_pid; /* 0 = none */
    int64_t hook_deadline_ms;
    bool owes_alive;
};

/* The last requests to start a worker: one that comes twice is started once. */
struct work {
    uint64_t ids[WORK_IDS_KEPT];
    unsigned next;
};

struct listener {
    int fd;
    uint16_t port;
    bool watched;
};

struct init {
    struct options options;
    int epoll_fd;
    struct link link;
    struct streams streams;
    struct agent agent;
    struct restore restore;
    struct work work;
    struct listener listeners[LISTENERS_MAX];
    int64_t lack_until_ms; /* of descriptors or memory: nothing is accepted, no output read before; 0 = none */
    enum barrier barrier;
    uint64_t barrier_number;
    uint32_t version; /* of the protocol, as this host and init both speak it */
    bool owes_pong;
    uint64_t pong_number;
    unsigned turn; /* which stream sends first */
    char log[LOG_HELD_BYTES_MAX]; /* NUL-terminated lines that wait for a link */
    size_t log_bytes;
    bool exit_acked;
};

/* main.c */
int64_t now_ms(void);
__attribute__((format(printf, 2, 3))) void log_line(struct init *init, const char *format, ...);

/* relay.c: connections and output pipes */
bool relay_listen(struct init *init);
void relay_accept(struct init *init, struct listener *listener);
void relay_event(struct init *init, struct stream *stream, uint32_t events);
/* Gives the client what is there for it, and the end when that is all. */
void relay_deliver(struct stream *stream);
/* Ends a connection; the host is told. */
void relay_close(struct stream *stream, enum ending ending);
/* Brings epoll's interest in line with what each stream may do now. */
void relay_watch(struct init *init);
bool relay_needs_retry(const struct init *init);
void relay_retry(struct init *init);
/* Reads an output pipe; true when it is at its end or empty for now. */
bool relay_drain_output(struct init *init, struct stream *stream);

/* host.c: what the host says */
void host_frame(void *init, const struct frame *frame);

/* report.c: what init says */
void report_hello(struct init *init);
void report_pump(struct init *init);

/* agent.c: the agent's life */
void agent_spec_piece(struct init *init, uint64_t offset, const uint8_t *bytes, size_t len);
void agent_start(struct init *init, uint64_t spec_bytes);
void agent_signal(struct init *init, int signal_number);
void agent_reaped(struct init *init, pid_t pid, int wait_status);
/* After the main process ended: output, stragglers, EXIT. */
void agent_wind_up(struct init *init);
/* In a fork: signals as a program expects them. */
void child_reset_signals(void);

/* work.c: workers, which do what a person asks of the sandbox */
void work_open(struct init *init, uint32_t stream_id, uint64_t request_id, const uint8_t *name, size_t name_bytes);
/* With a new link the streams of the old one's workers end; what they had started lives on. */
void work_drop_all(struct init *init);

/* restore.c: incarnations */
/* A path below RUN_DIR; false: it is too long. */
bool run_path(const struct init *init, const char *name, char path[RUN_PATH_MAX]);
void restore_begin(struct init *init, uint64_t incarnation, const uint8_t *entropy);
void restore_restored(struct init *init, const struct frame *frame);
void restore_reaped(struct init *init, pid_t pid);
void restore_tick(struct init *init);

#endif
