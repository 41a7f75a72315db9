/* HTTP/1.1 as far as one closed connection needs it: every answer of Torpor carries `Connection: close`, its body has a
 * length or is chunked. */
#include "http.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

enum { READ_BYTES = 65536, CHUNK_DIGITS_MAX = 8 };

/* The line that begins at `at`, without its end; NULL when there is no whole one. */
static const char *take_line(const char **at, const char *end, size_t *len) {
    const char *line = *at, *newline = memchr(line, '\n', (size_t)(end - line));
    if (!newline) return NULL;
    *len = (size_t)(newline - line);
    if (*len > 0 && line[*len - 1] == '\r') --*len;
    *at = newline + 1;
    return line;
}

static bool is_header(const char *line, size_t len, const char *name, const char **value, size_t *value_len) {
    size_t name_len = strlen(name);
    if (len <= name_len || line[name_len] != ':' || strncasecmp(line, name, name_len) != 0) return false;
    *value = line + name_len + 1;
    *value_len = len - name_len - 1;
    while (*value_len > 0 && (**value == ' ' || **value == '\t')) ++*value, --*value_len;
    return true;
}

/* A number of at most eight digits to that base; `*digits` is how many there were. */
static size_t read_number(const char *at, size_t len, unsigned base, size_t *digits) {
    size_t number = 0, i = 0;
    for (; i < len && i <= CHUNK_DIGITS_MAX; i++) {
        const char *all = "0123456789abcdef", *found = at[i] ? strchr(all, at[i] | (at[i] >= 'A' ? 0x20 : 0)) : NULL;
        if (!found || (unsigned)(found - all) >= base) break;
        number = number * base + (size_t)(found - all);
    }
    *digits = i > CHUNK_DIGITS_MAX ? 0 : i;
    return number;
}

static bool read_chunks(const char *at, const char *end, struct text *body) {
    for (;;) {
        size_t len, digits;
        const char *line = take_line(&at, end, &len);
        size_t bytes = line ? read_number(line, len, 16, &digits) : 0;
        if (!line || digits == 0 || (digits < len && line[digits] != ';')) return false;
        if (bytes == 0) return true;
        if (bytes > (size_t)(end - at)) return false;
        text_add(body, at, bytes);
        at += bytes;
        if (!take_line(&at, end, &len) || len != 0) return false;
    }
}

bool http_read_answer(const char *bytes, size_t len, struct answer *answer) {
    const char *at = bytes, *end = bytes + len, *value;
    size_t line_len, value_len, digits, length = 0;
    bool has_length = false, chunked = false;
    const char *line = take_line(&at, end, &line_len);
    if (!line || line_len < 12 || memcmp(line, "HTTP/1.", 7) != 0 || line[8] != ' ') return false;
    answer->status = (int)read_number(line + 9, 3, 10, &digits);
    if (digits != 3) return false;
    while ((line = take_line(&at, end, &line_len)) && line_len > 0) {
        if (is_header(line, line_len, "content-length", &value, &value_len)) {
            length = read_number(value, value_len, 10, &digits);
            if (digits == 0) return false;
            has_length = true;
        } else if (is_header(line, line_len, "transfer-encoding", &value, &value_len)) {
            chunked = value_len == 7 && !strncasecmp(value, "chunked", 7);
        }
    }
    if (!line) return false;
    if (chunked) return read_chunks(at, end, &answer->body) && !answer->body.failed;
    if (has_length && length > (size_t)(end - at)) return false;
    text_add(&answer->body, at, has_length ? length : (size_t)(end - at));
    return !answer->body.failed;
}

static bool send_all(int fd, const char *bytes, size_t len) {
    while (len > 0) {
        ssize_t put = send(fd, bytes, len, MSG_NOSIGNAL);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return false;
        bytes += put;
        len -= (size_t)put;
    }
    return true;
}

static enum http_outcome receive(int fd, struct text *received) {
    static char bytes[READ_BYTES];
    for (;;) {
        ssize_t got = recv(fd, bytes, sizeof bytes, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got == 0) return HTTP_ANSWERED;
        if (got < 0) return HTTP_CUT_OFF;
        text_add(received, bytes, (size_t)got);
        if (received->failed) return HTTP_BROKEN;
    }
}

static enum http_outcome exchange(int fd, const struct text *request, struct answer *answer) {
    struct text received = {0};
    enum http_outcome outcome = HTTP_CUT_OFF;
    if (send_all(fd, request->bytes, request->len)) outcome = receive(fd, &received);
    if (outcome == HTTP_ANSWERED && !http_read_answer(received.bytes ? received.bytes : "", received.len, answer)) {
        /* What does not even begin like HTTP is not half of it. */
        bool begins = received.len < 5 || !memcmp(received.bytes, "HTTP/", 5);
        outcome = begins && !answer->body.failed ? HTTP_CUT_OFF : HTTP_BROKEN;
    }
    text_free(&received);
    return outcome;
}

enum http_outcome http_ask(const struct sockaddr_in *address, const char *method, const char *path,
                           const struct text *body, struct answer *answer) {
    struct text request = {0};
    char length[64];
    const char *heads[] = {method, " ", path, " HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) text_add_string(&request, heads[i]);
    if (body) {
        snprintf(length, sizeof length, "Content-Type: application/json\r\nContent-Length: %zu\r\n", body->len);
        text_add_string(&request, length);
    }
    text_add_string(&request, "\r\n");
    if (body) text_add(&request, body->bytes, body->len);
    memset(answer, 0, sizeof *answer);
    enum http_outcome outcome = HTTP_UNREACHABLE;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (request.failed)
        outcome = HTTP_BROKEN;
    else if (fd >= 0 && connect(fd, (const struct sockaddr *)address, sizeof *address) == 0)
        outcome = exchange(fd, &request, answer);
    int error = errno;
    if (fd >= 0) close(fd);
    text_free(&request);
    errno = error;
    return outcome;
}
