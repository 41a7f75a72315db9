/* The streams: what was read from the agent and not yet acknowledged, and what the host sent and the agent has not
 * yet taken. Owns all large memory of init and its bounds; knows no sockets and no frames.
 *
 *   request   0 ... A ... floor ... sent ... R        bytes [floor, R) are in memory
 *   response  0 ... W ... V                           bytes [W, V) are in memory
 */
#ifndef TORPOR_STREAM_H
#define TORPOR_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The streams of workers are numbered by the host, from here on. */
#define STREAM_FIRST_WORKER 0x80000000u

enum {
    CALLS_MAX = 256,
    OUTPUTS = 2,
    CALLS_END = OUTPUTS + CALLS_MAX, /* the slots: outputs, calls, workers */
    WORKERS_MAX = 32,
    STREAMS_MAX = CALLS_END + WORKERS_MAX,
    STREAMS_TOLD_MAX = CALLS_END,
    STREAM_STDOUT = 1,
    STREAM_STDERR = 2,
    STREAM_FIRST_CALL = 16,
    CREDIT_INITIAL_BYTES = 262144,
    RESPONSE_WINDOW_BYTES = 262144,
    OUTPUT_HELD_BYTES_MAX = 1048576,
};

/* How a stream ended, as CLOSED says it. */
enum ending { ENDING_NONE = 0, ENDING_CONSUMED = 1, ENDING_GONE = 2, ENDING_RESET = 3 };

struct chunk;

struct stream {
    bool used;
    bool output; /* the agent's stdout or stderr, no connection */
    bool worker; /* a worker's socket: lasts as long as the link, and no status tells of it */
    uint32_t id;
    uint16_t port;
    int fd; /* -1 once closed */
    bool watched;
    uint32_t watched_events;

    uint64_t read_bytes;   /* R */
    uint64_t acked;        /* A */
    uint64_t floor;        /* the first byte still in memory; above A only for a stream that cannot be resumed */
    uint64_t sent;
    uint64_t credit;
    bool ended;            /* the client half-closed before its answer was complete, or the output ended */
    bool at_end;           /* a read returned 0 */
    bool not_resumable;
    struct chunk *first, *last, *cursor;

    uint64_t taken;        /* V */
    uint64_t accepted;     /* W */
    uint64_t fin_at;
    bool fin_known;
    bool shut;             /* everything up to FIN was delivered and our side is shut down */
    uint8_t *response;     /* RESPONSE_WINDOW_BYTES, when first needed */
    size_t response_start; /* position of byte W */

    enum ending ending;
    bool quiet;            /* since HELLO, until the host's first RESUME or CREDIT */
    bool owes_open, owes_fin, owes_taken, owes_closed;
};

struct streams {
    struct stream slot[STREAMS_MAX]; /* the outputs come first */
    uint64_t next_id;
    uint64_t request_bytes_max, total_bytes_max;
    uint64_t total_bytes; /* of request chunks, outputs excepted: those have a bound of their own */
};

void streams_init(struct streams *all, uint64_t request_bytes_max, uint64_t total_bytes_max);
struct stream *stream_find(struct streams *all, uint32_t id);
/* Those that a status tells of. */
unsigned streams_count(const struct streams *all);

/* True when another connection can get a stream. */
bool streams_have_room(const struct streams *all);
/* NULL when there is no room. */
struct stream *stream_open_call(struct streams *all, int fd, uint16_t port);
struct stream *stream_open_output(struct streams *all, uint32_t id, int fd);
/* NULL when the number is no worker's or in use, or when there are too many. */
struct stream *stream_open_worker(struct streams *all, uint32_t id, int fd);
void stream_forget(struct streams *all, struct stream *stream);
/* True once the host was told how it ended, by CLOSED or STATUS: the last word about a stream on this link. */
bool stream_end_is_told(const struct stream *stream);

/* Where to put the next request bytes, and how many are welcome: 0 = not now. `*out_of_memory` tells apart. */
size_t request_space(struct streams *all, struct stream *stream, uint8_t **where, bool *out_of_memory);
/* True when request_space would give some. */
bool request_welcome(struct streams *all, struct stream *stream);
/* Says how many bytes were put there, 0 included. */
void request_added(struct streams *all, struct stream *stream, size_t len);
/* Puts bytes there as if they had been read; false when there is no room for all of them. */
bool request_put(struct streams *all, struct stream *stream, const uint8_t *bytes, size_t len);
/* The bytes at `sent`, as many as lie together. */
size_t request_peek(struct stream *stream, const uint8_t **bytes);
void request_ack(struct streams *all, struct stream *stream, uint64_t below);
/* Gives up what was read but will never be sent: the client is gone and the host granted no more credit. */
void request_cut_unsent(struct streams *all, struct stream *stream);
/* Gives up all of it: the host wants no more of this stream. */
void request_discard(struct streams *all, struct stream *stream);
void request_rewind(struct stream *stream, uint64_t position);

/* Takes in response bytes by the rules for gaps, repetitions and the window. False: out of memory. */
bool response_take(struct stream *stream, uint64_t offset, const uint8_t *bytes, size_t len);
size_t response_peek(const struct stream *stream, const uint8_t **bytes);
void response_delivered(struct stream *stream, size_t len);
void response_drop(struct stream *stream);

#endif
