/* Feeds the frame reader what a broken or hostile peer might send, in any pieces. Under ASan and UBSan it must not
 * trip; a frame that gets through must be well-formed and encode back to itself; good frames must get through.
 *
 *   fuzz-frame SEED ROUNDS      the same seed does the same
 *   with -DLIBFUZZER            an entry point for libFuzzer instead
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crc32c.h"
#include "frame.h"

static uint64_t frames_seen;

static void check_frame(void *context, const struct frame *frame) {
    static uint8_t wire[FRAME_WIRE_MAX];
    struct frame again;
    (void)context;
    if (frame->payload_bytes > FRAME_PAYLOAD_MAX) abort();
    size_t len = frame_encode(frame, wire);
    if (len > FRAME_WIRE_MAX || wire[len - 1] != 0) abort();
    if (!frame_decode(wire, len - 1, &again)) abort();
    if (again.nonce != frame->nonce || again.type != frame->type || again.stream != frame->stream) abort();
    if (again.arg != frame->arg || again.payload_bytes != frame->payload_bytes) abort();
    if (memcmp(again.payload, frame->payload, frame->payload_bytes) != 0) abort();
    frames_seen++;
}

/* A copy of the exact size on the heap, so that ASan sees a read past its end. */
static void feed(struct frame_reader *reader, const uint8_t *bytes, size_t len) {
    uint8_t *copy = malloc(len ? len : 1);
    if (!copy) abort();
    memcpy(copy, bytes, len);
    frame_reader_feed(reader, copy, len, check_frame, NULL);
    free(copy);
    if (reader->held_bytes > sizeof reader->held) abort();
}

#ifdef LIBFUZZER

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    static struct frame_reader reader;
    crc32c_init();
    memset(&reader, 0, sizeof reader);
    feed(&reader, data, len / 2);
    feed(&reader, data + len / 2, len - len / 2);
    return 0;
}

#else

enum { STREAM_BYTES = 4 * FRAME_WIRE_MAX };
static uint64_t random_state;

static uint64_t random_below(uint64_t bound) { /* xorshift64* */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (random_state * 0x2545f4914f6cdd1dull >> 16) % bound;
}

static size_t random_size(void) {
    static const size_t likely[] = {0, 1, 4, 40, 254, 255, 508, 1000};
    if (random_below(16) == 0) return random_below(FRAME_PAYLOAD_MAX + 1);
    return likely[random_below(sizeof likely / sizeof *likely)];
}

static size_t random_frame(uint8_t *out) {
    static uint8_t payload[FRAME_PAYLOAD_MAX];
    struct frame frame = {.nonce = random_below(3), .type = (uint8_t)random_below(256), .payload = payload};
    frame.stream = (uint32_t)random_below(300);
    frame.arg = random_below(2) ? random_below(1000) : ~random_below(1000);
    frame.payload_bytes = random_size();
    uint64_t zeros = 1 + random_below(300);
    for (size_t i = 0; i < frame.payload_bytes; i++)
        payload[i] = random_below(zeros) == 0 ? 0 : (uint8_t)random_below(256);
    return frame_encode(&frame, out);
}

static size_t mutate(uint8_t *bytes, size_t len) {
    for (uint64_t left = 1 + random_below(4); left > 0 && len > 1; left--) {
        size_t at = random_below(len), run = random_below(len - at) + 1;
        switch (random_below(6)) {
        case 0: bytes[at] ^= (uint8_t)(1u << random_below(8)); break;
        case 1: bytes[at] = (uint8_t)random_below(256); break;
        case 2: bytes[at] = 0; break;
        case 3: bytes[at] = 0xff; break;
        case 4: /* cut a run out */
            memmove(bytes + at, bytes + at + run, len - at - run);
            len -= run;
            break;
        default: /* write a run twice */
            if (len + run > STREAM_BYTES) break;
            memmove(bytes + at + run, bytes + at, len - at);
            len += run;
        }
    }
    return len;
}

static void feed_in_pieces(struct frame_reader *reader, const uint8_t *bytes, size_t len) {
    while (len > 0) {
        size_t piece = random_below(4) == 0 ? 1 + random_below(8) : 1 + random_below(len);
        if (piece > len) piece = len;
        feed(reader, bytes, piece);
        bytes += piece;
        len -= piece;
    }
}

static void one_round(struct frame_reader *reader, uint8_t *stream) {
    size_t len = 0, frames = 1 + random_below(3);
    bool noise = random_below(8) == 0;
    for (size_t i = 0; i < frames; i++) len += random_frame(stream + len);
    if (noise)
        for (size_t i = 0; i < len; i++) stream[i] = (uint8_t)random_below(256);
    bool clean = !noise && random_below(4) == 0;
    if (!noise && !clean) len = mutate(stream, len);
    uint64_t before = frames_seen;
    feed(reader, (const uint8_t *)"", 1); /* ends the last round's leftover */
    uint64_t dropped = reader->dropped;
    feed_in_pieces(reader, stream, len);
    if (clean && (frames_seen - before < frames || reader->dropped != dropped)) abort();
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    uint64_t rounds = argc > 2 ? strtoull(argv[2], NULL, 10) : 100000;
    struct frame_reader *reader = calloc(1, sizeof *reader);
    uint8_t *stream = malloc(STREAM_BYTES);
    if (!reader || !stream) return 1;
    crc32c_init();
    random_state = seed * 2 + 1;
    for (uint64_t i = 0; i < rounds; i++) one_round(reader, stream);
    printf("seed %" PRIu64 ": %" PRIu64 " rounds, %" PRIu64 " frames, %" PRIu64 " dropped\n", seed, rounds, frames_seen,
           reader->dropped);
    free(reader);
    free(stream);
    return 0;
}

#endif
