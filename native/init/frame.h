/* Frames of the link: a 24-byte header, a payload and a CRC32C, COBS-encoded, ended by one zero byte.
 * Pure: no descriptors, no allocation. Whatever bytes come in, nothing is read or written out of bounds. */
#ifndef TORPOR_FRAME_H
#define TORPOR_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    FRAME_HEADER_BYTES = 24,
    FRAME_CRC_BYTES = 4,
    FRAME_PAYLOAD_MAX = 32768,
    FRAME_RAW_MAX = FRAME_HEADER_BYTES + FRAME_PAYLOAD_MAX + FRAME_CRC_BYTES,
    /* COBS adds at most one byte for each 254 and one more. */
    FRAME_COBS_MAX = FRAME_RAW_MAX + FRAME_RAW_MAX / 254 + 1,
    FRAME_WIRE_MAX = FRAME_COBS_MAX + 1,
};

enum host_frame {
    HOST_HELLO = 0x01,
    HOST_SPEC,
    HOST_START,
    HOST_RESTORED,
    HOST_DATA,
    HOST_FIN,
    HOST_RESET,
    HOST_ACK,
    HOST_CREDIT,
    HOST_RESUME,
    HOST_BARRIER,
    HOST_RELEASE,
    HOST_PING,
    HOST_SIGNAL,
    HOST_EXIT_ACK,
    HOST_FORGET,
    HOST_WORK,
};

enum guest_frame {
    GUEST_STATUS = 0x81,
    GUEST_OPEN,
    GUEST_DATA,
    GUEST_FIN,
    GUEST_CLOSED,
    GUEST_TAKEN,
    GUEST_BARRIER_ACK,
    GUEST_ALIVE,
    GUEST_EXIT,
    GUEST_PONG,
    GUEST_LOG,
    GUEST_STARTED,
};

struct frame {
    uint64_t nonce;
    uint8_t type;
    uint32_t stream;
    uint64_t arg;
    const uint8_t *payload;
    size_t payload_bytes;
};

/* COBS without the final zero. `out` needs len + len / 254 + 1 bytes; returns the bytes written. */
size_t cobs_encode(const uint8_t *in, size_t len, uint8_t *out);

/* Decodes where the bytes lie. Returns false for what is not COBS. */
bool cobs_decode(uint8_t *bytes, size_t len, size_t *decoded_bytes);

/* Writes the frame as it goes on the wire, its zero included, to `out` (FRAME_WIRE_MAX bytes). */
size_t frame_encode(const struct frame *frame, uint8_t *out);

/* Decodes one frame (without its zero) in place; the payload points into `wire`. */
bool frame_decode(uint8_t *wire, size_t len, struct frame *frame);

/* Cuts a byte stream into frames and counts what it had to drop. */
struct frame_reader {
    uint8_t held[FRAME_COBS_MAX];
    size_t held_bytes;
    bool too_long; /* dropping until the next zero */
    uint64_t dropped;
};

typedef void frame_handler(void *context, const struct frame *frame);

void frame_reader_feed(struct frame_reader *reader, const uint8_t *bytes, size_t len, frame_handler *handle,
                       void *context);

#endif
