/* What the host says. Frames passed the CRC and the nonce, yet every number in them is checked: a confused host must
 * not be able to bring PID 1 down either. */
#include "bytes.h"
#include "init.h"

enum { START_BYTES = 16 + ENTROPY_BYTES };

static void on_hello(struct init *init, const struct frame *frame) {
    link_begin(&init->link, frame->nonce);
    /* A host that is older than this init gets what it knows. */
    init->version = frame->arg < 1 || frame->arg > PROTOCOL_VERSION ? PROTOCOL_VERSION : (uint32_t)frame->arg;
    init->barrier = BARRIER_NONE;
    report_hello(init);
}

static void on_start(struct init *init, const struct frame *frame) {
    enum phase phase = init->agent.phase;
    if (phase == PHASE_RUNNING || phase == PHASE_EXITED || frame->payload_bytes < START_BYTES) return;
    restore_begin(init, get_u64(frame->payload), frame->payload + 16);
    agent_start(init, frame->arg);
}

static void on_signal(struct init *init, const struct frame *frame) {
    if (frame->arg <= init->agent.last_signal_id) return;
    init->agent.last_signal_id = frame->arg;
    agent_signal(init, (int)frame->stream);
}

static void on_exit_ack(struct init *init) {
    init->exit_acked = init->agent.phase == PHASE_EXITED || init->agent.phase == PHASE_NOT_STARTED;
}

static void on_link_frame(struct init *init, const struct frame *frame) {
    switch (frame->type) {
    case HOST_HELLO: on_hello(init, frame); break;
    case HOST_SPEC: agent_spec_piece(init, frame->arg, frame->payload, frame->payload_bytes); break;
    case HOST_START: on_start(init, frame); break;
    case HOST_RESTORED: restore_restored(init, frame); break;
    case HOST_BARRIER:
        init->barrier = BARRIER_FLUSHING;
        init->barrier_number = frame->arg;
        break;
    case HOST_RELEASE:
        if (frame->arg == init->barrier_number) init->barrier = BARRIER_NONE;
        break;
    case HOST_PING:
        init->owes_pong = true;
        init->pong_number = frame->arg;
        break;
    case HOST_EXIT_ACK: on_exit_ack(init); break;
    default: break; /* a later version's; ignoring it is the contract */
    }
}

static void on_data(struct init *init, struct stream *stream, const struct frame *frame) {
    if (stream->output || stream->ending != ENDING_NONE || stream->shut) return;
    if (!response_take(stream, frame->arg, frame->payload, frame->payload_bytes)) {
        log_line(init, "cannot keep the answer of stream %u: out of memory", stream->id);
        relay_close(stream, ENDING_GONE);
        return;
    }
    relay_deliver(stream);
}

static void on_fin(struct stream *stream, uint64_t length) {
    if (stream->output || stream->ending != ENDING_NONE || stream->shut || length < stream->taken) return;
    stream->fin_known = true;
    stream->fin_at = length;
    relay_deliver(stream);
}

/* What the client did first stays true: the RESET may have crossed a CLOSED that no log has yet. */
static void on_reset(struct init *init, struct stream *stream) {
    if (stream->output) return;
    relay_close(stream, ENDING_RESET);
    request_discard(&init->streams, stream);
    stream->quiet = false; /* so that CLOSED follows, also right after HELLO */
}

/* Only this ends the memory of an end: the host says that its log has it. Output has no end of that kind. */
static void on_forget(struct init *init, struct stream *stream) {
    if (stream->ending != ENDING_NONE) stream_forget(&init->streams, stream);
}

static void on_resume(struct init *init, struct stream *stream, uint64_t position) {
    if (position < stream->floor || position > stream->read_bytes) {
        log_line(init, "cannot resume stream %u: position is not in memory", stream->id);
        return;
    }
    request_rewind(stream, position);
    stream->owes_fin = stream->ended && !stream_end_is_told(stream);
    stream->quiet = false;
}

static void on_credit(struct stream *stream, uint64_t limit) {
    if (limit > stream->credit) stream->credit = limit;
    stream->quiet = false;
}

static void on_stream_frame(struct init *init, struct stream *stream, const struct frame *frame) {
    switch (frame->type) {
    case HOST_DATA: on_data(init, stream, frame); break;
    case HOST_FIN: on_fin(stream, frame->arg); break;
    case HOST_RESET: on_reset(init, stream); break;
    case HOST_FORGET: on_forget(init, stream); break;
    case HOST_ACK: request_ack(&init->streams, stream, frame->arg); break;
    case HOST_CREDIT: on_credit(stream, frame->arg); break;
    case HOST_RESUME: on_resume(init, stream, frame->arg); break;
    default: break;
    }
}

void host_frame(void *context, const struct frame *frame) {
    struct init *init = context;
    if (frame->type == HOST_SIGNAL) {
        on_signal(init, frame); /* its stream field is the signal's number */
        return;
    }
    if (frame->type == HOST_WORK) {
        work_open(init, frame->stream, frame->arg, frame->payload, frame->payload_bytes);
        return;
    }
    if (frame->stream == 0) {
        on_link_frame(init, frame);
        return;
    }
    struct stream *stream = stream_find(&init->streams, frame->stream);
    if (stream) on_stream_frame(init, stream, frame);
}
