/* Records in both directions, without allocation. */
#include "record.h"

#include <string.h>

#include "bytes.h"

enum { FAILURE_TEXT_MAX = 512, FAILURE_HEAD_BYTES = 4 };

size_t record_encode(uint8_t type, const void *payload, size_t len, uint8_t *out) {
    out[0] = type;
    put_u32(out + 1, (uint32_t)len);
    if (len > 0) memmove(out + RECORD_HEADER_BYTES, payload, len);
    return RECORD_HEADER_BYTES + len;
}

size_t record_failure(int error, const char *text, uint8_t *out) {
    uint8_t payload[FAILURE_HEAD_BYTES + FAILURE_TEXT_MAX];
    size_t len = strnlen(text, FAILURE_TEXT_MAX);
    put_u32(payload, (uint32_t)error);
    memcpy(payload + FAILURE_HEAD_BYTES, text, len);
    return record_encode('F', payload, FAILURE_HEAD_BYTES + len, out);
}

/* Bytes that are still missing from the record that is held in part. */
static size_t missing(const struct record_reader *reader) {
    if (reader->held_bytes < RECORD_HEADER_BYTES) return RECORD_HEADER_BYTES - reader->held_bytes;
    return RECORD_HEADER_BYTES + get_u32(reader->held + 1) - reader->held_bytes;
}

bool record_reader_feed(struct record_reader *reader, const uint8_t *bytes, size_t len, record_handler *handle,
                        void *context) {
    while (len > 0) {
        size_t wanted = missing(reader), piece = len < wanted ? len : wanted;
        memcpy(reader->held + reader->held_bytes, bytes, piece);
        reader->held_bytes += piece;
        bytes += piece;
        len -= piece;
        if (reader->held_bytes < RECORD_HEADER_BYTES) continue;
        uint32_t payload_bytes = get_u32(reader->held + 1);
        if (payload_bytes > RECORD_PAYLOAD_MAX) return false;
        if (missing(reader) > 0) continue;
        reader->held_bytes = 0;
        if (!handle(context, reader->held[0], reader->held + RECORD_HEADER_BYTES, payload_bytes)) return false;
    }
    return true;
}
