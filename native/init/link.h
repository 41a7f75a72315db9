/* The guest's end of the two FIFOs: reads frames from one, queues frames for the other, and waits without spinning
 * while no host is there. Knows nonces; knows nothing of what frames mean. */
#ifndef TORPOR_LINK_H
#define TORPOR_LINK_H

#include <stdbool.h>
#include <stdint.h>

#include "frame.h"

enum {
    LINK_QUEUE_BYTES = 262144,
    /* Request bytes are queued below this mark only: what they leave free is for control frames, and a short queue
     * makes a short barrier. */
    LINK_DATA_MARK_BYTES = 131072,
    LINK_AWAY_RETRY_MS = 50,
};

struct link {
    int in_fd, out_fd;
    int epoll_fd;
    uint64_t in_tag, out_tag; /* epoll data of the two */
    bool in_watched, out_watched; /* by epoll; an end without a host is not */
    bool up;                      /* a HELLO was seen */
    uint64_t nonce;
    uint64_t foreign; /* frames with another link's nonce */
    struct frame_reader reader;
    uint8_t queue[LINK_QUEUE_BYTES];
    size_t queue_start, queue_end;
};

void link_init(struct link *link, int epoll_fd, int in_fd, uint64_t in_tag, int out_fd, uint64_t out_tag);

/* Reads what is there and hands over the good frames: those of this link, and every HELLO. */
void link_receive(struct link *link, frame_handler *handle, void *context);

/* Begins a new link: forgets what was queued for the old one. */
void link_begin(struct link *link, uint64_t nonce);

bool link_has_room(const struct link *link);
bool link_has_room_for_data(const struct link *link);

/* Queues a frame. The caller has seen link_has_room. */
void link_queue(struct link *link, uint8_t type, uint32_t stream, uint64_t arg, const void *payload, size_t len);

/* Writes what the FIFO takes. */
void link_flush(struct link *link);

/* True while the host must be looked for by the clock, since no event will tell that it is back. */
bool link_needs_retry(const struct link *link);
bool link_is_empty(const struct link *link);
uint64_t link_dropped(const struct link *link);

#endif
