/* What a program is started with: NUL-terminated strings, in the order cwd, argc, the arguments, envc, the environment.
 * The agent's own and those of `exec` have the same form. */
#ifndef TORPOR_SPEC_H
#define TORPOR_SPEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SPEC_BYTES_MAX = 2097152 };

struct spec {
    char *cwd;
    char **args; /* NULL-terminated */
    char **environment;
    char **pointers; /* what both point into: the caller frees it */
};

/* The spec points into `bytes`. False: it is not one; `pointers` is to be freed even then. */
bool spec_parse(uint8_t *bytes, size_t len, struct spec *spec);

#endif
