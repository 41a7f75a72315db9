/* One HTTP request to Torpor's loopback port, and its whole answer. */
#ifndef TORPOR_HTTP_H
#define TORPOR_HTTP_H

#include <netinet/in.h>
#include <stdbool.h>

#include "json.h"

struct answer {
    int status;
    struct text body;
};

/* What a request came to. */
enum http_outcome {
    HTTP_ANSWERED,
    HTTP_UNREACHABLE, /* errno says why: nobody listens */
    HTTP_CUT_OFF,     /* the connection ended before the answer did: the same request may be made again */
    HTTP_BROKEN,      /* what came is no HTTP answer, or is longer than TEXT_BYTES_MAX */
};

/* Waits for as long as it takes. A `body` of NULL is none. */
enum http_outcome http_ask(const struct sockaddr_in *address, const char *method, const char *path,
                           const struct text *body, struct answer *answer);

/* Reads an answer that came whole; the body of `answer` is what it carries. False: it is not one, or not whole. */
bool http_read_answer(const char *bytes, size_t len, struct answer *answer);

#endif
