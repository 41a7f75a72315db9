/* What a worker and the host say to each other on the worker's stream:
 *
 *   u8 type | u32 length, little-endian | payload, at most RECORD_PAYLOAD_MAX bytes
 *
 * The types are in docs/init-protocol.md. Pure but for the two functions that wait on a socket. */
#ifndef TORPOR_RECORD_H
#define TORPOR_RECORD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { RECORD_HEADER_BYTES = 5, RECORD_PAYLOAD_MAX = 32768, RECORD_BYTES_MAX = RECORD_HEADER_BYTES + RECORD_PAYLOAD_MAX };

/* Writes header and payload to `out`, which has room for both; returns the bytes written. */
size_t record_encode(uint8_t type, const void *payload, size_t len, uint8_t *out);

/* The record of a failure: its errno and what could not be done. At most 512 bytes of text. */
size_t record_failure(int error, const char *text, uint8_t *out);

/* Cuts a byte stream into records. */
struct record_reader {
    uint8_t held[RECORD_BYTES_MAX];
    size_t held_bytes;
};

/* False: end the reading, what follows cannot be understood or is not wanted. */
typedef bool record_handler(void *context, uint8_t type, const uint8_t *payload, size_t len);

/* False: a record was too long, or its handler says no. */
bool record_reader_feed(struct record_reader *reader, const uint8_t *bytes, size_t len, record_handler *handle,
                        void *context);

#endif
