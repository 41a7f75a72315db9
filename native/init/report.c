/* What init tells the host. Nothing is an event that could be lost: each duty to tell is a flag in the state, and
 * the pump turns flags into frames while the queue has room. So a slow host costs no memory, and after a HELLO the
 * flags that STATUS answers are simply taken down. */
#include <string.h>

#include "bytes.h"
#include "init.h"

enum { STATUS_HEAD_BYTES = 56, STATUS_STREAM_BYTES = 48 };
enum { FLAG_HALF_CLOSED = 1, FLAG_FIN_RECEIVED = 4, FLAG_NOT_RESUMABLE = 8 };
static const uint8_t ending_flag[] = {[ENDING_NONE] = 0, [ENDING_CONSUMED] = 16, [ENDING_GONE] = 2, [ENDING_RESET] = 32};
_Static_assert(STATUS_HEAD_BYTES + STREAMS_TOLD_MAX * STATUS_STREAM_BYTES <= FRAME_PAYLOAD_MAX, "STATUS is one frame");

static size_t put_stream(uint8_t *at, const struct stream *stream) {
    uint8_t flags = ending_flag[stream->ending];
    if (stream->ended) flags |= FLAG_HALF_CLOSED;
    if (stream->fin_known) flags |= FLAG_FIN_RECEIVED;
    if (stream->not_resumable) flags |= FLAG_NOT_RESUMABLE;
    put_u32(at, stream->id);
    put_u16(at + 4, stream->port);
    at[6] = stream->output;
    at[7] = flags;
    put_u64(at + 8, stream->read_bytes);
    put_u64(at + 16, stream->acked);
    put_u64(at + 24, stream->taken);
    put_u64(at + 32, stream->accepted);
    put_u64(at + 40, stream->sent);
    return STATUS_STREAM_BYTES;
}

static void queue_status(struct init *init, uint8_t type, uint64_t arg) {
    static uint8_t record[STATUS_HEAD_BYTES + STREAMS_TOLD_MAX * STATUS_STREAM_BYTES];
    put_u32(record, init->version);
    put_u32(record + 4, init->agent.phase);
    put_u64(record + 8, init->restore.incarnation);
    put_u32(record + 16, (uint32_t)init->agent.wait_status);
    put_u32(record + 20, (uint32_t)init->agent.pid);
    put_u64(record + 24, init->streams.next_id);
    put_u64(record + 32, init->agent.last_signal_id);
    put_u64(record + 40, link_dropped(&init->link));
    put_u32(record + 48, init->agent.start_errno);
    put_u32(record + 52, streams_count(&init->streams));
    size_t len = STATUS_HEAD_BYTES;
    for (int i = 0; i < STREAMS_TOLD_MAX; i++)
        if (init->streams.slot[i].used) len += put_stream(record + len, &init->streams.slot[i]);
    link_queue(&init->link, type, 0, arg, record, len);
}

void report_hello(struct init *init) {
    work_drop_all(init);
    for (int i = 0; i < STREAMS_TOLD_MAX; i++) {
        struct stream *stream = &init->streams.slot[i];
        if (!stream->used) continue;
        stream->quiet = true;
        stream->credit = 0;
        request_rewind(stream, stream->acked);
        stream->owes_open = stream->owes_taken = stream->owes_closed = false; /* STATUS says it */
        stream->owes_fin = stream->ended && !stream_end_is_told(stream);
    }
    init->agent.owes_started = false;
    init->agent.owes_exit = init->agent.phase == PHASE_EXITED;
    init->restore.owes_alive = false;
    init->owes_pong = false;
    queue_status(init, GUEST_STATUS, init->version);
}

static void queue(struct init *init, uint8_t type, uint32_t stream, uint64_t arg) {
    link_queue(&init->link, type, stream, arg, NULL, 0);
}

static void pump_log(struct init *init) {
    while (init->log_bytes > 0 && link_has_room(&init->link)) {
        size_t len = strlen(init->log);
        link_queue(&init->link, GUEST_LOG, 0, 0, init->log, len);
        init->log_bytes -= len + 1;
        memmove(init->log, init->log + len + 1, init->log_bytes);
    }
}

static void pump_link(struct init *init) {
    struct agent *agent = &init->agent;
    pump_log(init);
    if (init->owes_pong && link_has_room(&init->link)) {
        queue(init, GUEST_PONG, 0, init->pong_number);
        init->owes_pong = false;
    }
    if (agent->owes_started && link_has_room(&init->link)) {
        link_queue(&init->link, GUEST_STARTED, 0, agent->start_errno, agent->start_error,
                   strlen(agent->start_error));
        agent->owes_started = false;
    }
    if (init->restore.owes_alive && link_has_room(&init->link)) {
        queue(init, GUEST_ALIVE, 0, init->restore.incarnation);
        init->restore.owes_alive = false;
    }
}

/* One piece of request data; false if there is nothing to send or nothing may be sent now. */
static bool pump_data(struct init *init, struct stream *stream) {
    const uint8_t *bytes;
    if (stream->quiet || stream->sent >= stream->credit || !link_has_room_for_data(&init->link)) return false;
    if (stream_end_is_told(stream)) return false;
    size_t len = request_peek(stream, &bytes);
    if (len == 0) return false;
    if (len > FRAME_PAYLOAD_MAX) len = FRAME_PAYLOAD_MAX;
    if (len > stream->credit - stream->sent) len = (size_t)(stream->credit - stream->sent);
    link_queue(&init->link, GUEST_DATA, stream->id, stream->sent, bytes, len);
    stream->sent += len;
    return true;
}

/* CLOSED comes after the data, or at the end of the host's credit: a host that has answered need not read on. */
static bool closed_is_due(const struct init *init, const struct stream *stream) {
    if (!stream->owes_closed) return false;
    if (stream->sent == stream->read_bytes) return true;
    if (stream->not_resumable && stream->sent < stream->floor) return true;
    return init->barrier == BARRIER_NONE && stream->credit > 0 && stream->sent >= stream->credit;
}

static void pump_stream(struct init *init, struct stream *stream) {
    if (stream->quiet || !link_has_room(&init->link)) return;
    if (stream->owes_fin && stream->sent == stream->read_bytes) {
        queue(init, GUEST_FIN, stream->id, stream->read_bytes);
        stream->owes_fin = false;
    }
    if (stream->owes_taken && stream->ending == ENDING_NONE && link_has_room(&init->link)) {
        uint8_t taken[8];
        put_u64(taken, stream->taken);
        link_queue(&init->link, GUEST_TAKEN, stream->id, stream->accepted, taken, sizeof taken);
        stream->owes_taken = false;
    }
    if (closed_is_due(init, stream) && link_has_room(&init->link)) {
        uint8_t how = (uint8_t)stream->ending;
        request_cut_unsent(&init->streams, stream);
        link_queue(&init->link, GUEST_CLOSED, stream->id, stream->accepted, &how, 1);
        stream->owes_closed = stream->owes_fin = false; /* nothing of a stream goes after its CLOSED */
    }
}

/* OPENs go in the order of their numbers, which is not the order of the slots. */
static void pump_opens(struct init *init) {
    while (link_has_room(&init->link)) {
        struct stream *next = NULL;
        for (int i = 0; i < STREAMS_MAX; i++) {
            struct stream *stream = &init->streams.slot[i];
            if (stream->used && stream->owes_open && (!next || stream->id < next->id)) next = stream;
        }
        if (!next) return;
        queue(init, GUEST_OPEN, next->id, next->port);
        next->owes_open = false;
    }
}

/* Its client has left or half-closed, and the host will be told as soon as there is room, or its first credit after
 * HELLO. A half-closed stream at the end of its credit may wait for ever, so nobody waits for it. */
static bool end_is_untold(const struct stream *stream) {
    if (!stream->used || stream->output) return false;
    return stream->owes_closed || (stream->owes_fin && (stream->credit == 0 || stream->sent < stream->credit));
}

/* Ends go before all else. A retry must not reach the host before the end that caused it, or it is taken for a second
 * request on purpose: as long as an end waits behind its own data, the data of newer streams waits too.
 * Returns the newest stream whose data may go. */
static uint32_t pump_ends(struct init *init) {
    uint32_t newest = UINT32_MAX;
    for (int i = OUTPUTS; i < CALLS_END; i++) { /* a worker's stream is nobody's retry */
        struct stream *stream = &init->streams.slot[i];
        bool ends = stream->used && (stream->owes_fin || stream->owes_closed);
        if (ends && !stream->owes_open) pump_stream(init, stream);
        if (end_is_untold(stream) && stream->id < newest) newest = stream->id;
    }
    return newest;
}

static bool pump_streams(struct init *init) {
    bool progress = false;
    unsigned first = init->turn++;
    uint32_t newest = pump_ends(init);
    pump_opens(init);
    for (unsigned i = 0; i < STREAMS_MAX; i++) {
        struct stream *stream = &init->streams.slot[(first + i) % STREAMS_MAX];
        if (!stream->used) continue;
        if (stream->owes_open) continue; /* nothing of a stream goes before its OPEN */
        if (init->barrier == BARRIER_NONE && (stream->worker || stream->id <= newest)) progress |= pump_data(init, stream);
        pump_stream(init, stream);
    }
    return progress;
}

static bool stream_owes_control(const struct stream *stream) {
    return stream->used && (stream->owes_open || (stream->owes_taken && !stream->quiet));
}

static void pump_barrier(struct init *init) {
    for (int i = 0; i < STREAMS_MAX; i++)
        if (stream_owes_control(&init->streams.slot[i])) return; /* the queue is full; it comes after a flush */
    if (init->log_bytes > 0 || !link_has_room(&init->link)) return;
    queue_status(init, GUEST_BARRIER_ACK, init->barrier_number);
    init->barrier = BARRIER_HELD;
}

void report_pump(struct init *init) {
    if (!init->link.up || init->barrier == BARRIER_HELD) return;
    pump_link(init);
    while (pump_streams(init)) continue;
    /* EXIT comes after the output that the host has granted. */
    if (init->agent.owes_exit && link_has_room_for_data(&init->link)) {
        uint8_t status[4];
        put_u32(status, (uint32_t)init->agent.wait_status);
        link_queue(&init->link, GUEST_EXIT, 0, 0, status, sizeof status);
        init->agent.owes_exit = false;
    }
    if (init->barrier == BARRIER_FLUSHING) pump_barrier(init);
}
