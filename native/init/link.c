/* Non-blocking FIFO ends. A read of 0 and EPIPE mean "no host": that end leaves epoll, where it would be ready for
 * ever, and is tried again by the clock until a host is back. */
#include "link.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { READ_BYTES = 65536, READS_PER_TURN = 8 };

static void watch(struct link *link, int fd, uint64_t tag, uint32_t events, bool on, bool *watched) {
    if (on == *watched) return;
    struct epoll_event event = {.events = events, .data.u64 = tag};
    if (epoll_ctl(link->epoll_fd, on ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, fd, &event) == 0) *watched = on;
}

static void watch_in(struct link *link, bool on) {
    watch(link, link->in_fd, link->in_tag, EPOLLIN, on, &link->in_watched);
}

static void watch_out(struct link *link, bool on) {
    watch(link, link->out_fd, link->out_tag, EPOLLOUT, on, &link->out_watched);
}

void link_init(struct link *link, int epoll_fd, int in_fd, uint64_t in_tag, int out_fd, uint64_t out_tag) {
    memset(link, 0, sizeof *link);
    link->epoll_fd = epoll_fd;
    link->in_fd = in_fd;
    link->out_fd = out_fd;
    link->in_tag = in_tag;
    link->out_tag = out_tag;
    watch_in(link, true);
}

struct sieve {
    struct link *link;
    frame_handler *handle;
    void *context;
};

static void sift(void *context, const struct frame *frame) {
    const struct sieve *sieve = context;
    bool hello = frame->type == HOST_HELLO && frame->stream == 0;
    if (hello || (sieve->link->up && frame->nonce == sieve->link->nonce))
        sieve->handle(sieve->context, frame);
    else
        sieve->link->foreign++;
}

void link_receive(struct link *link, frame_handler *handle, void *context) {
    static uint8_t bytes[READ_BYTES];
    struct sieve sieve = {.link = link, .handle = handle, .context = context};
    for (int turn = 0; turn < READS_PER_TURN; turn++) {
        ssize_t got = read(link->in_fd, bytes, sizeof bytes);
        if (got < 0 && errno == EINTR) continue;
        /* 0 is no host. Any other error is no reason to end either: PID 1 waits for its next host. */
        watch_in(link, got > 0 || (got < 0 && errno == EAGAIN));
        if (got <= 0) return;
        frame_reader_feed(&link->reader, bytes, (size_t)got, sift, &sieve);
        if ((size_t)got < sizeof bytes) return;
    }
}

void link_begin(struct link *link, uint64_t nonce) {
    link->up = true;
    link->nonce = nonce;
    /* The zero ends whatever half frame the old link left in the FIFO. */
    link->queue_start = 0;
    link->queue_end = 1;
    link->queue[0] = 0;
}

static size_t queued(const struct link *link) {
    return link->queue_end - link->queue_start;
}

bool link_has_room(const struct link *link) {
    return LINK_QUEUE_BYTES - queued(link) >= FRAME_WIRE_MAX;
}

bool link_has_room_for_data(const struct link *link) {
    return queued(link) < LINK_DATA_MARK_BYTES;
}

void link_queue(struct link *link, uint8_t type, uint32_t stream, uint64_t arg, const void *payload, size_t len) {
    assert(link_has_room(link));
    if (LINK_QUEUE_BYTES - link->queue_end < FRAME_WIRE_MAX) {
        memmove(link->queue, link->queue + link->queue_start, queued(link));
        link->queue_end = queued(link);
        link->queue_start = 0;
    }
    struct frame frame = {.nonce = link->nonce, .type = type, .stream = stream, .arg = arg};
    frame.payload = payload;
    frame.payload_bytes = len;
    link->queue_end += frame_encode(&frame, link->queue + link->queue_end);
}

void link_flush(struct link *link) {
    while (queued(link) > 0) {
        ssize_t put = write(link->out_fd, link->queue + link->queue_start, queued(link));
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) {
            watch_out(link, put < 0 && errno == EAGAIN); /* full is worth an event, away is not */
            return;
        }
        link->queue_start += (size_t)put;
    }
    link->queue_start = link->queue_end = 0;
    watch_out(link, false);
}

bool link_needs_retry(const struct link *link) {
    return !link->in_watched || (queued(link) > 0 && !link->out_watched);
}

bool link_is_empty(const struct link *link) {
    return queued(link) == 0;
}

uint64_t link_dropped(const struct link *link) {
    return link->reader.dropped + link->foreign;
}
