/* COBS, the frame header and the cutting of a byte stream into frames. */
#include "frame.h"

#include <assert.h>
#include <string.h>

#include "bytes.h"
#include "crc32c.h"

enum { COBS_RUN_MAX = 254 };

size_t cobs_encode(const uint8_t *in, size_t len, uint8_t *out) {
    uint8_t *to = out;
    for (;;) {
        size_t window = len < COBS_RUN_MAX ? len : COBS_RUN_MAX;
        const uint8_t *zero = window > 0 ? memchr(in, 0, window) : NULL;
        size_t run = zero ? (size_t)(zero - in) : window;
        *to++ = (uint8_t)(run + 1);
        if (run > 0) memcpy(to, in, run);
        to += run;
        in += run;
        len -= run;
        if (zero) { /* its block stands for the zero; what follows it needs a block even if empty */
            in++;
            len--;
        } else if (len == 0) {
            return (size_t)(to - out);
        }
    }
}

bool cobs_decode(uint8_t *bytes, size_t len, size_t *decoded_bytes) {
    size_t from = 0, to = 0;
    while (from < len) {
        uint8_t code = bytes[from++];
        size_t run = (size_t)code - 1;
        if (code == 0 || run > len - from) return false;
        memmove(bytes + to, bytes + from, run); /* `to` never overtakes `from` */
        from += run;
        to += run;
        if (code <= COBS_RUN_MAX && from < len) bytes[to++] = 0;
    }
    *decoded_bytes = to;
    return true;
}

size_t frame_encode(const struct frame *frame, uint8_t *out) {
    static uint8_t raw[FRAME_RAW_MAX]; /* 32 KiB of stack would be much for every caller */
    assert(frame->payload_bytes <= FRAME_PAYLOAD_MAX);
    memset(raw, 0, FRAME_HEADER_BYTES);
    put_u64(raw, frame->nonce);
    raw[8] = frame->type;
    put_u32(raw + 12, frame->stream);
    put_u64(raw + 16, frame->arg);
    size_t len = FRAME_HEADER_BYTES;
    if (frame->payload_bytes > 0) memcpy(raw + len, frame->payload, frame->payload_bytes);
    len += frame->payload_bytes;
    put_u32(raw + len, crc32c(raw, len));
    size_t encoded = cobs_encode(raw, len + FRAME_CRC_BYTES, out);
    out[encoded] = 0;
    return encoded + 1;
}

bool frame_decode(uint8_t *wire, size_t len, struct frame *frame) {
    size_t raw = 0;
    if (!cobs_decode(wire, len, &raw)) return false;
    if (raw < FRAME_HEADER_BYTES + FRAME_CRC_BYTES || raw > FRAME_RAW_MAX) return false;
    size_t covered = raw - FRAME_CRC_BYTES;
    if (get_u32(wire + covered) != crc32c(wire, covered)) return false;
    frame->nonce = get_u64(wire);
    frame->type = wire[8];
    frame->stream = get_u32(wire + 12);
    frame->arg = get_u64(wire + 16);
    frame->payload = wire + FRAME_HEADER_BYTES;
    frame->payload_bytes = covered - FRAME_HEADER_BYTES;
    return true;
}

static void hold(struct frame_reader *reader, const uint8_t *bytes, size_t len) {
    if (len == 0 || reader->too_long) return;
    if (len > sizeof reader->held - reader->held_bytes) {
        reader->too_long = true;
        return;
    }
    memcpy(reader->held + reader->held_bytes, bytes, len);
    reader->held_bytes += len;
}

static void finish_frame(struct frame_reader *reader, frame_handler *handle, void *context) {
    struct frame frame;
    bool empty = reader->held_bytes == 0 && !reader->too_long; /* a zero that only separates */
    bool good = !empty && !reader->too_long && frame_decode(reader->held, reader->held_bytes, &frame);
    if (good)
        handle(context, &frame);
    else if (!empty)
        reader->dropped++;
    reader->held_bytes = 0;
    reader->too_long = false;
}

void frame_reader_feed(struct frame_reader *reader, const uint8_t *bytes, size_t len, frame_handler *handle,
                       void *context) {
    while (len > 0) {
        const uint8_t *zero = memchr(bytes, 0, len);
        size_t run = zero ? (size_t)(zero - bytes) : len;
        hold(reader, bytes, run);
        if (!zero) return;
        finish_frame(reader, handle, context);
        bytes += run + 1;
        len -= run + 1;
    }
}
