/* Claims about CRC32C, COBS and frames, each against known answers or a round trip. Exits 0 if all hold. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "crc32c.h"
#include "frame.h"

#define CLAIM(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                            \
        }                                                                       \
    } while (0)

static void crc_has_the_published_values(void) {
    uint8_t zeros[32] = {0}, ones[32];
    memset(ones, 0xff, sizeof ones);
    CLAIM(crc32c((const uint8_t *)"123456789", 9) == 0xe3069283u);
    CLAIM(crc32c(zeros, sizeof zeros) == 0x8a9136aau); /* RFC 3720, B.4 */
    CLAIM(crc32c(ones, sizeof ones) == 0x62a8ab43u);
    CLAIM(crc32c(zeros, 0) == 0);
}

static void cobs_is(const char *plain, size_t plain_len, const char *coded, size_t coded_len) {
    uint8_t out[64];
    CLAIM(cobs_encode((const uint8_t *)plain, plain_len, out) == coded_len);
    CLAIM(memcmp(out, coded, coded_len) == 0);
    size_t len;
    CLAIM(cobs_decode(out, coded_len, &len) && len == plain_len && memcmp(out, plain, plain_len) == 0);
}

static void cobs_has_the_published_values(void) {
    cobs_is("", 0, "\x01", 1);
    cobs_is("\0", 1, "\x01\x01", 2);
    cobs_is("\0\0", 2, "\x01\x01\x01", 3);
    cobs_is("\0\x11\0", 3, "\x01\x02\x11\x01", 4);
    cobs_is("\x11\x22\0\x33", 4, "\x03\x11\x22\x02\x33", 5);
    cobs_is("\x11\x22\x33\x44", 4, "\x05\x11\x22\x33\x44", 5);
    cobs_is("\x11\0\0\0", 4, "\x02\x11\x01\x01\x01", 5);
}

static void cobs_round_trips_at_every_length(void) {
    enum { LONGEST = 1100 };
    uint8_t plain[LONGEST], coded[LONGEST + LONGEST / 254 + 1];
    for (unsigned zero_each = 1; zero_each < 600; zero_each += zero_each < 5 ? 1 : 83)
        for (size_t len = 0; len <= LONGEST; len++) {
            for (size_t i = 0; i < len; i++) plain[i] = (i % zero_each == zero_each - 1) ? 0 : (uint8_t)(i | 1);
            size_t decoded, coded_len = cobs_encode(plain, len, coded);
            CLAIM(coded_len <= len + len / 254 + 1);
            CLAIM(!memchr(coded, 0, coded_len));
            CLAIM(cobs_decode(coded, coded_len, &decoded) && decoded == len && !memcmp(coded, plain, len));
        }
}

static void broken_cobs_is_refused(void) {
    size_t len;
    uint8_t runs_out[] = {0x05, 0x11}, has_zero[] = {0x02, 0x11, 0x00, 0x11};
    CLAIM(!cobs_decode(runs_out, sizeof runs_out, &len));
    CLAIM(!cobs_decode(has_zero, sizeof has_zero, &len));
    uint8_t both_ends[256] = {0xff}; /* a full run, with or without an empty block behind it */
    memset(both_ends + 1, 0x11, 254);
    both_ends[255] = 0x01;
    CLAIM(cobs_decode(both_ends, 256, &len) && len == 254);
}

static struct frame last;
static uint8_t last_payload[FRAME_PAYLOAD_MAX];
static unsigned handled;

static void note(void *context, const struct frame *frame) {
    (void)context;
    last = *frame;
    memcpy(last_payload, frame->payload, frame->payload_bytes);
    handled++;
}

static void frames_round_trip_in_any_pieces(void) {
    static uint8_t wire[FRAME_WIRE_MAX], payload[FRAME_PAYLOAD_MAX];
    static struct frame_reader reader;
    for (size_t i = 0; i < sizeof payload; i++) payload[i] = (uint8_t)(i * 7 >> 3);
    const size_t sizes[] = {0, 1, 253, 254, 255, 4096, FRAME_PAYLOAD_MAX};
    const size_t pieces[] = {1, 2, 255, 65536};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (size_t p = 0; p < sizeof pieces / sizeof *pieces; p++) {
            struct frame frame = {.nonce = 0x1122334400667788u, .type = 0x83, .stream = 0xfffffffeu};
            frame.arg = ~0ull - 1;
            frame.payload = payload;
            frame.payload_bytes = sizes[s];
            size_t len = frame_encode(&frame, wire);
            CLAIM(len <= FRAME_WIRE_MAX && wire[len - 1] == 0);
            handled = 0;
            for (size_t at = 0; at < len; at += pieces[p])
                frame_reader_feed(&reader, wire + at, len - at < pieces[p] ? len - at : pieces[p], note, NULL);
            CLAIM(handled == 1 && reader.dropped == 0);
            CLAIM(last.nonce == frame.nonce && last.type == frame.type && last.stream == frame.stream);
            CLAIM(last.arg == frame.arg && last.payload_bytes == sizes[s]);
            CLAIM(!memcmp(last_payload, payload, sizes[s]));
        }
}

static void what_is_no_frame_is_dropped_and_counted(void) {
    static uint8_t wire[FRAME_WIRE_MAX], noise[3 * FRAME_WIRE_MAX], raw[FRAME_RAW_MAX + 1];
    static struct frame_reader reader;
    struct frame frame = {.nonce = 1, .type = HOST_PING};
    size_t len = frame_encode(&frame, wire);
    handled = 0;
    frame_reader_feed(&reader, (const uint8_t *)"\0\0\0", 3, note, NULL);
    CLAIM(reader.dropped == 0); /* zeros only separate */
    for (size_t i = 0; i + 1 < len; i++) { /* every single bit error but those that make a zero */
        wire[i] ^= 0x80;
        frame_reader_feed(&reader, wire, len, note, NULL);
        wire[i] ^= 0x80;
    }
    CLAIM(handled == 0 && reader.dropped >= len - 1);
    memset(noise, 0x42, sizeof noise); /* longer than any frame: dropped once, and held nowhere */
    uint64_t before = reader.dropped;
    frame_reader_feed(&reader, noise, sizeof noise, note, NULL);
    frame_reader_feed(&reader, wire + len - 1, 1, note, NULL);
    CLAIM(reader.dropped == before + 1);
    frame_reader_feed(&reader, wire, len, note, NULL);
    CLAIM(handled == 1); /* and the next good frame is taken */
    size_t too_long = FRAME_HEADER_BYTES + FRAME_PAYLOAD_MAX + 1; /* right CRC, payload one byte over */
    put_u32(raw + too_long, crc32c(raw, too_long));
    len = cobs_encode(raw, too_long + FRAME_CRC_BYTES, noise);
    CLAIM(!frame_decode(noise, len, &frame));
    size_t too_short = FRAME_HEADER_BYTES - 1;
    put_u32(raw + too_short, crc32c(raw, too_short));
    len = cobs_encode(raw, too_short + FRAME_CRC_BYTES, noise);
    CLAIM(!frame_decode(noise, len, &frame));
}

int main(void) {
    crc32c_init();
    crc_has_the_published_values();
    cobs_has_the_published_values();
    cobs_round_trips_at_every_length();
    broken_cobs_is_refused();
    frames_round_trip_in_any_pieces();
    what_is_no_frame_is_dropped_and_counted();
    puts("frames: all claims hold");
    return 0;
}
