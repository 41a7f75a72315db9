/* The table of streams, the kept request bytes (a list of chunks) and the waiting response bytes (one buffer). */
#include "stream.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* With malloc's own header a chunk is a whole number of pages, which go back to the kernel when freed: what init
 * no longer needs must not stay in the sandbox's image. */
enum { CHUNK_BYTES = 65536, CHUNK_HEADER_BYTES = 32 };

struct chunk {
    struct chunk *next;
    uint64_t base; /* offset in the request of data[0] */
    uint32_t used;
    uint8_t data[CHUNK_BYTES - CHUNK_HEADER_BYTES - 16];
};

void streams_init(struct streams *all, uint64_t request_bytes_max, uint64_t total_bytes_max) {
    memset(all, 0, sizeof *all);
    all->next_id = STREAM_FIRST_CALL;
    all->request_bytes_max = request_bytes_max;
    all->total_bytes_max = total_bytes_max;
}

struct stream *stream_find(struct streams *all, uint32_t id) {
    for (int i = 0; i < STREAMS_MAX; i++)
        if (all->slot[i].used && all->slot[i].id == id) return &all->slot[i];
    return NULL;
}

unsigned streams_count(const struct streams *all) {
    unsigned count = 0;
    for (int i = 0; i < STREAMS_TOLD_MAX; i++) count += all->slot[i].used;
    return count;
}

static struct stream *free_call_slot(const struct streams *all) {
    for (int i = OUTPUTS; i < CALLS_END; i++)
        if (!all->slot[i].used) return (struct stream *)&all->slot[i];
    return NULL;
}

bool streams_have_room(const struct streams *all) {
    return all->next_id < STREAM_FIRST_WORKER && free_call_slot(all) != NULL;
}

static struct stream *fill_slot(struct stream *stream, uint32_t id, int fd) {
    memset(stream, 0, sizeof *stream);
    stream->used = true;
    stream->id = id;
    stream->fd = fd;
    stream->credit = CREDIT_INITIAL_BYTES;
    return stream;
}

struct stream *stream_open_call(struct streams *all, int fd, uint16_t port) {
    struct stream *slot = free_call_slot(all);
    if (!slot || all->next_id >= STREAM_FIRST_WORKER) return NULL;
    struct stream *stream = fill_slot(slot, (uint32_t)all->next_id++, fd);
    stream->port = port;
    stream->owes_open = true;
    return stream;
}

struct stream *stream_open_output(struct streams *all, uint32_t id, int fd) {
    assert(id == STREAM_STDOUT || id == STREAM_STDERR);
    struct stream *stream = fill_slot(&all->slot[id - STREAM_STDOUT], id, fd);
    stream->output = true;
    return stream;
}

struct stream *stream_open_worker(struct streams *all, uint32_t id, int fd) {
    if (id < STREAM_FIRST_WORKER || stream_find(all, id)) return NULL;
    for (int i = CALLS_END; i < STREAMS_MAX; i++) {
        if (all->slot[i].used) continue;
        struct stream *stream = fill_slot(&all->slot[i], id, fd);
        stream->worker = true;
        return stream;
    }
    return NULL;
}

static void free_first_chunk(struct streams *all, struct stream *stream) {
    struct chunk *chunk = stream->first;
    stream->first = chunk->next;
    if (stream->cursor == chunk) stream->cursor = chunk->next;
    if (stream->last == chunk) stream->last = NULL;
    if (!stream->output) all->total_bytes -= CHUNK_BYTES;
    free(chunk);
}

/* Moves the floor up and frees the chunks that lie wholly below it. */
static void raise_floor(struct streams *all, struct stream *stream, uint64_t floor) {
    if (floor > stream->floor) stream->floor = floor;
    while (stream->first && stream->first->base + stream->first->used <= stream->floor)
        free_first_chunk(all, stream);
}

void stream_forget(struct streams *all, struct stream *stream) {
    assert(stream->fd < 0);
    while (stream->first) free_first_chunk(all, stream);
    response_drop(stream);
    stream->used = false;
}

bool stream_end_is_told(const struct stream *stream) {
    return stream->ending != ENDING_NONE && !stream->owes_closed;
}

/* How many more bytes this stream may read by its own limits. */
static uint64_t request_allowance(struct streams *all, struct stream *stream) {
    if (stream->output) {
        uint64_t held = stream->read_bytes - stream->floor;
        return held < OUTPUT_HELD_BYTES_MAX ? OUTPUT_HELD_BYTES_MAX - held : 0;
    }
    if (stream->credit <= stream->read_bytes) return 0;
    uint64_t credit = stream->credit - stream->read_bytes;
    uint64_t kept = stream->read_bytes - stream->floor;
    if (kept >= all->request_bytes_max && stream->sent > stream->floor) {
        /* Too large to be sent again: it goes on as a stream that does not survive its link. */
        stream->not_resumable = true;
        raise_floor(all, stream, stream->sent);
        kept = stream->read_bytes - stream->floor;
    }
    uint64_t room = kept < all->request_bytes_max ? all->request_bytes_max - kept : 0;
    return credit < room ? credit : room;
}

static bool add_chunk(struct streams *all, struct stream *stream) {
    struct chunk *chunk = malloc(sizeof *chunk);
    if (!chunk) return false;
    chunk->next = NULL;
    chunk->base = stream->read_bytes;
    chunk->used = 0;
    if (stream->last)
        stream->last->next = chunk;
    else
        stream->first = chunk;
    stream->last = chunk;
    if (!stream->output) all->total_bytes += CHUNK_BYTES;
    return true;
}

static bool needs_chunk(const struct stream *stream) {
    return !stream->last || stream->last->used == sizeof stream->last->data;
}

static bool may_add_chunk(const struct streams *all, const struct stream *stream) {
    return stream->output || all->total_bytes + CHUNK_BYTES <= all->total_bytes_max;
}

bool request_welcome(struct streams *all, struct stream *stream) {
    return request_allowance(all, stream) > 0 && (!needs_chunk(stream) || may_add_chunk(all, stream));
}

size_t request_space(struct streams *all, struct stream *stream, uint8_t **where, bool *out_of_memory) {
    *out_of_memory = false;
    uint64_t allowance = request_allowance(all, stream);
    if (allowance == 0) return 0;
    if (needs_chunk(stream)) {
        if (!may_add_chunk(all, stream)) return 0;
        *out_of_memory = !add_chunk(all, stream);
        if (*out_of_memory) return 0;
    }
    struct chunk *last = stream->last;
    *where = last->data + last->used;
    size_t space = sizeof last->data - last->used;
    return allowance < space ? (size_t)allowance : space;
}

void request_added(struct streams *all, struct stream *stream, size_t len) {
    stream->last->used += (uint32_t)len;
    stream->read_bytes += len;
    if (len == 0) raise_floor(all, stream, stream->floor); /* an empty chunk need not stay */
}

bool request_put(struct streams *all, struct stream *stream, const uint8_t *bytes, size_t len) {
    uint8_t *where;
    bool out_of_memory;
    if (request_space(all, stream, &where, &out_of_memory) < len) return false;
    memcpy(where, bytes, len);
    request_added(all, stream, len);
    return true;
}

size_t request_peek(struct stream *stream, const uint8_t **bytes) {
    if (stream->sent < stream->floor || stream->sent >= stream->read_bytes) return 0;
    struct chunk *chunk = stream->cursor;
    if (!chunk || chunk->base > stream->sent) chunk = stream->first;
    while (chunk && chunk->base + chunk->used <= stream->sent) chunk = chunk->next;
    stream->cursor = chunk;
    if (!chunk) return 0;
    size_t skip = (size_t)(stream->sent - chunk->base);
    *bytes = chunk->data + skip;
    return chunk->used - skip;
}

void request_ack(struct streams *all, struct stream *stream, uint64_t below) {
    if (below <= stream->acked || below > stream->read_bytes) return;
    stream->acked = below;
    if (stream->sent < below) stream->sent = below;
    raise_floor(all, stream, below);
}

void request_cut_unsent(struct streams *all, struct stream *stream) {
    if (stream->sent >= stream->read_bytes || stream->sent < stream->floor) return;
    stream->read_bytes = stream->sent;
    stream->ended = stream->owes_fin = false; /* the request does not end here, it is cut */
    /* The stream is closed, nothing is read into it again: only the bookkeeping must stay true. */
    struct chunk *chunk = stream->first, *kept = NULL;
    for (; chunk && chunk->base < stream->sent; chunk = chunk->next) {
        if (chunk->base + chunk->used > stream->sent) chunk->used = (uint32_t)(stream->sent - chunk->base);
        kept = chunk;
    }
    struct chunk *surplus = kept ? kept->next : stream->first;
    if (kept)
        kept->next = NULL;
    else
        stream->first = NULL;
    stream->last = kept;
    stream->cursor = NULL;
    while (surplus) {
        struct chunk *next = surplus->next;
        if (!stream->output) all->total_bytes -= CHUNK_BYTES;
        free(surplus);
        surplus = next;
    }
}

void request_discard(struct streams *all, struct stream *stream) {
    if (stream->sent < stream->read_bytes) stream->ended = stream->owes_fin = false;
    stream->acked = stream->sent = stream->read_bytes;
    raise_floor(all, stream, stream->read_bytes);
}

void request_rewind(struct stream *stream, uint64_t position) {
    stream->sent = position;
    stream->cursor = NULL;
}

static bool response_append(struct stream *stream, const uint8_t *bytes, size_t len) {
    size_t waiting = (size_t)(stream->taken - stream->accepted);
    if (!stream->response && !(stream->response = malloc(RESPONSE_WINDOW_BYTES))) return false;
    if (stream->response_start + waiting + len > RESPONSE_WINDOW_BYTES) {
        memmove(stream->response, stream->response + stream->response_start, waiting);
        stream->response_start = 0;
    }
    memcpy(stream->response + stream->response_start + waiting, bytes, len);
    stream->taken += len;
    return true;
}

bool response_take(struct stream *stream, uint64_t offset, const uint8_t *bytes, size_t len) {
    uint64_t limit = stream->accepted + RESPONSE_WINDOW_BYTES;
    if (stream->fin_known && stream->fin_at < limit) limit = stream->fin_at;
    if (offset > stream->taken) {
        stream->owes_taken = true; /* a gap: tell the host where we are */
        return true;
    }
    uint64_t end = offset + len; /* no overflow: a true count bounds the offset */
    if (end > limit) {
        end = limit;
        stream->owes_taken = true; /* more than was allowed: tell the host how much we took */
    }
    if (end <= stream->taken) return true;
    return response_append(stream, bytes + (stream->taken - offset), (size_t)(end - stream->taken));
}

size_t response_peek(const struct stream *stream, const uint8_t **bytes) {
    size_t waiting = (size_t)(stream->taken - stream->accepted);
    if (!stream->response || waiting == 0) return 0;
    *bytes = stream->response + stream->response_start;
    return waiting;
}

void response_delivered(struct stream *stream, size_t len) {
    stream->accepted += len;
    stream->response_start += len;
    if (stream->accepted == stream->taken) stream->response_start = 0;
    stream->owes_taken = true;
}

void response_drop(struct stream *stream) {
    free(stream->response);
    stream->response = NULL;
    stream->response_start = 0;
}
