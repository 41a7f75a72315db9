/* As much JSON as torpor-guest needs: strings written, whole documents checked, members of an object found, strings read.
 * No recursion, no allocation but that of a text, which has a bound. */
#ifndef TORPOR_JSON_H
#define TORPOR_JSON_H

#include <stdbool.h>
#include <stddef.h>

enum { JSON_DEPTH_MAX = 512, TEXT_BYTES_MAX = 16 << 20 };

/* A growing byte string. Once `failed` nothing is added any more: out of memory, or beyond TEXT_BYTES_MAX. */
struct text {
    char *bytes;
    size_t len, room;
    bool failed;
};

void text_add(struct text *text, const char *bytes, size_t len);
void text_add_string(struct text *text, const char *string);
void text_free(struct text *text);

/* Adds bytes as a JSON string with its quotes. What is no UTF-8 becomes U+FFFD, one for each byte. */
void json_add_string(struct text *text, const char *bytes, size_t len);

/* A piece of a document: `bytes` points into it. */
struct json {
    const char *bytes;
    size_t len;
};

/* One value from `from` on, white space around it left out; `*rest` is what follows. False: there is none. */
bool json_value(struct json from, struct json *value, struct json *rest);
/* True when it is one JSON value and nothing else. */
bool json_is_valid(struct json document);

/* Goes through the members of an object: `*rest` is the document at first. False: no further one, or no object. */
struct json_member {
    struct json name, value; /* the name with its quotes */
};
bool json_begin_object(struct json object, struct json *rest);
bool json_next_member(struct json *rest, struct json_member *member);
/* The value of a member whose name has no escapes; false: there is none. */
bool json_find(struct json object, const char *name, struct json *value);

bool json_is_string(struct json value);
/* Adds what a string means, as UTF-8; half a surrogate pair becomes U+FFFD. The value was found by json_value. */
void json_read_string(struct json value, struct text *text);

#endif
