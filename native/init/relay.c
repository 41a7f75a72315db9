/* The agent's side of the streams: listeners, connections and output pipes. Everything is non-blocking; a connection
 * that misbehaves ends as a stream that says so, never as an error of init. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "init.h"

enum { LISTEN_BACKLOG = 512, ACCEPTS_PER_EVENT = 64, READS_PER_EVENT = 4, DISCARD_BYTES = 65536 };

static bool listen_on(struct init *init, struct listener *listener, const struct sockaddr_in *address) {
    int on = 1;
    listener->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener->fd < 0) return false;
    setsockopt(listener->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener->fd, (const struct sockaddr *)address, sizeof *address) < 0) return false;
    if (listen(listener->fd, LISTEN_BACKLOG) < 0) return false;
    struct sockaddr_in bound;
    socklen_t len = sizeof bound;
    if (getsockname(listener->fd, (struct sockaddr *)&bound, &len) < 0) return false;
    listener->port = ntohs(bound.sin_port);
    log_line(init, "listening %s:%u", inet_ntoa(bound.sin_addr), listener->port);
    return true;
}

bool relay_listen(struct init *init) {
    for (unsigned i = 0; i < init->options.listen_count; i++)
        if (!listen_on(init, &init->listeners[i], &init->options.listen[i])) return false;
    return true;
}

void relay_accept(struct init *init, struct listener *listener) {
    int on = 1;
    for (int i = 0; i < ACCEPTS_PER_EVENT; i++) {
        if (init->barrier != BARRIER_NONE || !streams_have_room(&init->streams)) return;
        int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            /* A client that left the backlog is nothing; a lack of something is waited out, not spun on. */
            if (errno == EINTR || errno == ECONNABORTED) continue;
            if (errno != EAGAIN) init->lack_until_ms = now_ms() + LACK_RETRY_MS;
            return;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (!stream_open_call(&init->streams, fd, listener->port)) close(fd);
    }
}

void relay_close(struct stream *stream, enum ending ending) {
    if (stream->ending != ENDING_NONE || stream->output) return;
    if (ending == ENDING_RESET) {
        struct linger at_once = {.l_onoff = 1, .l_linger = 0};
        setsockopt(stream->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    }
    close(stream->fd);
    stream->fd = -1;
    stream->watched = false;
    stream->ending = ending;
    stream->owes_closed = true;
    stream->owes_taken = false;
    response_drop(stream);
}

/* Both directions are shut. The client has consumed the answer only if the kernel says that the connection closed in
 * order: a client that closes with unread bytes answers our last ones with RST. */
static void settle(struct stream *stream) {
    int error = 0;
    socklen_t len = sizeof error;
    if (getsockopt(stream->fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0 && error != 0) {
        relay_close(stream, ENDING_GONE);
        return;
    }
    struct tcp_info info = {0};
    len = sizeof info;
    bool known = getsockopt(stream->fd, IPPROTO_TCP, TCP_INFO, &info, &len) == 0;
    if (!known || info.tcpi_state == TCP_CLOSE || info.tcpi_state == TCP_TIME_WAIT)
        relay_close(stream, ENDING_CONSUMED);
}

static bool is_settling(const struct stream *stream) {
    return stream->used && stream->fd >= 0 && stream->shut && stream->at_end;
}

void relay_deliver(struct stream *stream) {
    const uint8_t *bytes;
    size_t len;
    if (stream->fd < 0 || stream->output || stream->shut) return;
    while ((len = response_peek(stream, &bytes)) > 0) {
        ssize_t put = send(stream->fd, bytes, len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0 && errno == EAGAIN) return;
        if (put < 0) {
            relay_close(stream, ENDING_GONE);
            return;
        }
        response_delivered(stream, (size_t)put);
    }
    if (!stream->fin_known || stream->accepted != stream->fin_at) return;
    if (shutdown(stream->fd, SHUT_WR) < 0) {
        relay_close(stream, ENDING_GONE);
        return;
    }
    stream->shut = true;
    response_drop(stream);
    if (stream->at_end) settle(stream);
}

static void read_end(struct stream *stream) {
    stream->at_end = true;
    if (stream->shut) {
        settle(stream);
        return;
    }
    stream->ended = stream->owes_fin = true;
    if (!stream->output) return;
    close(stream->fd);
    stream->fd = -1;
    stream->watched = false;
}

/* What a failed read means. Returns false: nothing more to read now. */
static bool read_failed(struct stream *stream, int error) {
    if (error == EINTR) return true;
    if (error == EAGAIN) return false;
    if (stream->output)
        read_end(stream);
    else
        relay_close(stream, ENDING_GONE);
    return false;
}

/* After the whole answer went out only the client's end matters; bytes it still sends belong to no request. */
static void read_and_discard(struct stream *stream) {
    static uint8_t nowhere[DISCARD_BYTES];
    for (int i = 0; i < READS_PER_EVENT && stream->fd >= 0 && !stream->at_end; i++) {
        ssize_t got = read(stream->fd, nowhere, sizeof nowhere);
        if (got == 0)
            read_end(stream);
        else if (got < 0 && !read_failed(stream, errno))
            return;
    }
}

/* A request that cannot be kept is refused; output waits, and the agent with it. */
static void lacks_memory(struct init *init, struct stream *stream) {
    init->lack_until_ms = now_ms() + LACK_RETRY_MS;
    if (stream->output) return;
    log_line(init, "cannot keep request %u: out of memory", stream->id);
    relay_close(stream, ENDING_GONE);
}

static void read_request(struct init *init, struct stream *stream) {
    for (int i = 0; i < READS_PER_EVENT && stream->fd >= 0 && !stream->at_end; i++) {
        uint8_t *where;
        bool out_of_memory;
        size_t space = request_space(&init->streams, stream, &where, &out_of_memory);
        if (out_of_memory) lacks_memory(init, stream);
        if (space == 0) return;
        ssize_t got = read(stream->fd, where, space);
        int error = errno;
        request_added(&init->streams, stream, got > 0 ? (size_t)got : 0);
        if (got == 0)
            read_end(stream);
        else if (got < 0 && !read_failed(stream, error))
            return;
        else if (got > 0 && (size_t)got < space)
            return;
    }
}

static void check_error(struct stream *stream) {
    int error = 0;
    socklen_t len = sizeof error;
    if (stream->fd < 0 || stream->output) return;
    if (getsockopt(stream->fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0 && error != 0)
        relay_close(stream, ENDING_GONE);
}

void relay_event(struct init *init, struct stream *stream, uint32_t events) {
    if (stream->fd < 0) return;
    if (is_settling(stream)) {
        settle(stream);
        return;
    }
    if (init->barrier == BARRIER_NONE && (events & (EPOLLIN | EPOLLHUP | EPOLLERR))) {
        if (stream->shut)
            read_and_discard(stream);
        else
            read_request(init, stream);
    }
    relay_deliver(stream);
    if (events & (EPOLLERR | EPOLLHUP)) check_error(stream);
}

bool relay_drain_output(struct init *init, struct stream *stream) {
    while (stream->used && stream->fd >= 0) {
        uint64_t before = stream->read_bytes;
        if (init->lack_until_ms || !request_welcome(&init->streams, stream)) return false;
        read_request(init, stream);
        if (stream->fd >= 0 && !init->lack_until_ms && stream->read_bytes == before) return true;
    }
    return true;
}

/* What to wait for. Errors and hang-ups come unasked, and stay: where nothing else is awaited, being edge-triggered
 * keeps them from being reported for ever. */
static bool interest(struct init *init, struct stream *stream, uint32_t *events) {
    bool reading = init->barrier == BARRIER_NONE && !stream->at_end &&
                   (stream->shut || request_welcome(&init->streams, stream));
    const uint8_t *bytes;
    bool writing = !stream->output && !stream->shut && response_peek(stream, &bytes) > 0;
    *events = (reading ? EPOLLIN : 0) | (writing ? EPOLLOUT : 0);
    if (stream->output) return reading && !init->lack_until_ms;
    if (*events == 0) *events = EPOLLET | EPOLLRDHUP * is_settling(stream);
    return true;
}

static void watch_stream(struct init *init, struct stream *stream) {
    if (!stream->used || stream->fd < 0) return;
    uint32_t events;
    bool on = interest(init, stream, &events);
    if (on == stream->watched && (!on || events == stream->watched_events)) return;
    int change = !on ? EPOLL_CTL_DEL : stream->watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    struct epoll_event event = {.events = events, .data.u64 = TAGGED(TAG_STREAM, stream->id)};
    if (epoll_ctl(init->epoll_fd, change, stream->fd, &event) == 0) {
        stream->watched = on;
        stream->watched_events = events;
    } else if (on) {
        relay_close(stream, ENDING_GONE);
    }
}

void relay_watch(struct init *init) {
    bool accepting = init->barrier == BARRIER_NONE && streams_have_room(&init->streams) && !init->lack_until_ms;
    for (unsigned i = 0; i < init->options.listen_count; i++) {
        struct listener *listener = &init->listeners[i];
        if (listener->watched == accepting) continue;
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = TAGGED(TAG_LISTENER, i)};
        int change = accepting ? EPOLL_CTL_ADD : EPOLL_CTL_DEL;
        if (epoll_ctl(init->epoll_fd, change, listener->fd, &event) == 0) listener->watched = accepting;
    }
    for (int i = 0; i < STREAMS_MAX; i++) watch_stream(init, &init->streams.slot[i]);
}

bool relay_needs_retry(const struct init *init) {
    for (int i = 0; i < STREAMS_MAX; i++)
        if (is_settling(&init->streams.slot[i])) return true;
    return false;
}

void relay_retry(struct init *init) {
    for (int i = 0; i < STREAMS_MAX; i++)
        if (is_settling(&init->streams.slot[i])) settle(&init->streams.slot[i]);
}
