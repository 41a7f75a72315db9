/* Reads a spec in place. Every count is checked against the bytes that are there. */
#include "spec.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The next NUL-terminated string, or NULL. */
static char *next_string(char **at, const char *end) {
    if (*at >= end) return NULL;
    char *found = *at, *nul = memchr(found, 0, (size_t)(end - found));
    if (!nul) return NULL;
    *at = nul + 1;
    return found;
}

static bool next_strings(char **at, const char *end, char **strings, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!(strings[i] = next_string(at, end))) return false;
    return true;
}

/* A count cannot be true if it exceeds the bytes that are left: each string has at least its NUL. */
static bool next_count(char **at, const char *end, size_t *count) {
    char *text = next_string(at, end), *rest;
    if (!text || text[0] < '0' || text[0] > '9') return false;
    errno = 0;
    unsigned long long value = strtoull(text, &rest, 10);
    if (errno || *rest || value > (unsigned long long)(end - *at)) return false;
    *count = (size_t)value;
    return true;
}

bool spec_parse(uint8_t *bytes, size_t len, struct spec *spec) {
    char *at = (char *)bytes, *end = at + len;
    size_t arg_count, environment_count;
    spec->pointers = NULL;
    if (!(spec->cwd = next_string(&at, end)) || !next_count(&at, end, &arg_count) || arg_count == 0) return false;
    char **args = calloc(arg_count + 1, sizeof *args);
    if (!args) return false;
    spec->pointers = args;
    if (!next_strings(&at, end, args, arg_count) || !next_count(&at, end, &environment_count)) return false;
    char **both = realloc(args, (arg_count + 1 + environment_count + 1) * sizeof *both);
    if (!both) return false;
    spec->pointers = spec->args = both;
    spec->environment = both + arg_count + 1;
    spec->environment[environment_count] = NULL;
    return next_strings(&at, end, spec->environment, environment_count) && at == end;
}
