/* Every function stays within the bytes that it was given, whatever they are. */
#include "json.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT_ROOM_MIN = 256, REPLACEMENT = 0xfffd, HEX_DIGITS = 4 };

void text_add(struct text *text, const char *bytes, size_t len) {
    if (text->failed || len > TEXT_BYTES_MAX - text->len) {
        text->failed = true;
        return;
    }
    if (len > text->room - text->len) {
        size_t room = text->room ? text->room : TEXT_ROOM_MIN;
        while (room < text->len + len) room *= 2;
        char *bigger = realloc(text->bytes, room);
        text->failed = !bigger;
        if (!bigger) return;
        text->bytes = bigger;
        text->room = room;
    }
    if (len > 0) memcpy(text->bytes + text->len, bytes, len);
    text->len += len;
}

void text_add_string(struct text *text, const char *string) {
    text_add(text, string, strlen(string));
}

void text_free(struct text *text) {
    free(text->bytes);
    memset(text, 0, sizeof *text);
}

/* The length of the character that begins here, 0 if it is no well-formed UTF-8. */
static size_t utf8_length(const uint8_t *at, size_t len) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t wanted = at[0] < 0x80 ? 1 : at[0] >= 0xf0 ? 4 : at[0] >= 0xe0 ? 3 : 2;
    if (wanted == 1) return 1;
    if (at[0] < 0xc2 || at[0] > 0xf4 || wanted > len) return 0;
    uint32_t code = at[0] & (0x7fu >> wanted);
    for (size_t i = 1; i < wanted; i++) {
        if ((at[i] & 0xc0) != 0x80) return 0;
        code = code << 6 | (at[i] & 0x3f);
    }
    bool surrogate = code >= 0xd800 && code <= 0xdfff;
    return code < least[wanted] || code > 0x10ffff || surrogate ? 0 : wanted;
}

void json_add_string(struct text *text, const char *bytes, size_t len) {
    const uint8_t *at = (const uint8_t *)bytes, *end = at + len;
    text_add(text, "\"", 1);
    while (at < end) {
        size_t length = utf8_length(at, (size_t)(end - at));
        char escaped[8];
        if (length == 0) {
            text_add_string(text, "\\ufffd");
        } else if (*at == '"' || *at == '\\') {
            escaped[0] = '\\';
            escaped[1] = (char)*at;
            text_add(text, escaped, 2);
        } else if (*at < 0x20 || *at == 0x7f) {
            snprintf(escaped, sizeof escaped, "\\u%04x", *at);
            text_add_string(text, escaped);
        } else {
            text_add(text, (const char *)at, length);
        }
        at += length ? length : 1;
    }
    text_add(text, "\"", 1);
}

static struct json skip(struct json from, size_t len) {
    return (struct json){from.bytes + len, from.len - len};
}

static struct json skip_space(struct json from) {
    while (from.len > 0 && memchr(" \t\r\n", *from.bytes, 4)) from = skip(from, 1);
    return from;
}

static bool is_digit(char byte) {
    return byte >= '0' && byte <= '9';
}

static int hex_value(char byte) {
    if (is_digit(byte)) return byte - '0';
    if (byte >= 'a' && byte <= 'f') return byte - 'a' + 10;
    return byte >= 'A' && byte <= 'F' ? byte - 'A' + 10 : -1;
}

/* How long the string is that begins here with its quote, 0 if it is none. */
static size_t string_length(struct json from) {
    for (size_t at = 1; at < from.len; at++) {
        uint8_t byte = (uint8_t)from.bytes[at];
        if (byte == '"') return at + 1;
        if (byte < 0x20) return 0;
        if (byte != '\\') {
            size_t length = utf8_length((const uint8_t *)from.bytes + at, from.len - at);
            if (length == 0) return 0;
            at += length - 1;
            continue;
        }
        if (++at >= from.len || !from.bytes[at] || !strchr("\"\\/bfnrtu", from.bytes[at])) return 0;
        if (from.bytes[at] != 'u') continue;
        for (int i = 0; i < HEX_DIGITS; i++)
            if (++at >= from.len || hex_value(from.bytes[at]) < 0) return 0;
    }
    return 0;
}

static size_t digits(struct json from, size_t at) {
    while (at < from.len && is_digit(from.bytes[at])) at++;
    return at;
}

static size_t number_length(struct json from) {
    size_t at = from.bytes[0] == '-', start = at;
    at = digits(from, at);
    if (at == start || (from.bytes[start] == '0' && at > start + 1)) return 0;
    if (at < from.len && from.bytes[at] == '.') {
        start = at + 1;
        if ((at = digits(from, start)) == start) return 0;
    }
    if (at < from.len && (from.bytes[at] == 'e' || from.bytes[at] == 'E')) {
        start = at + 1;
        if (start < from.len && (from.bytes[start] == '+' || from.bytes[start] == '-')) start++;
        if ((at = digits(from, start)) == start) return 0;
    }
    return at;
}

static size_t scalar_length(struct json from) {
    static const char *const words[] = {"true", "false", "null"};
    if (from.len == 0) return 0;
    if (from.bytes[0] == '"') return string_length(from);
    for (int i = 0; i < 3; i++)
        if (from.len >= strlen(words[i]) && !memcmp(from.bytes, words[i], strlen(words[i]))) return strlen(words[i]);
    return number_length(from);
}

/* A member's name and its colon. */
static bool take_name(struct json *from) {
    *from = skip_space(*from);
    size_t len = from->len > 0 && *from->bytes == '"' ? string_length(*from) : 0;
    if (len == 0) return false;
    *from = skip_space(skip(*from, len));
    if (from->len == 0 || *from->bytes != ':') return false;
    *from = skip(*from, 1);
    return true;
}

/* Closes what ends here and goes on behind it. `*depth` is 0 at the end of the value. */
static bool take_ends(struct json *from, const char *open, unsigned *depth) {
    while (*depth > 0) {
        *from = skip_space(*from);
        if (from->len == 0) return false;
        char byte = *from->bytes, innermost = open[*depth - 1];
        *from = skip(*from, 1);
        if (byte == ',') return innermost == '[' || take_name(from);
        if (byte != (innermost == '[' ? ']' : '}')) return false;
        --*depth;
    }
    return true;
}

/* Opens what begins here; `*empty` when it ends at once. False: not JSON, or too deep. */
static bool take_opening(struct json *from, char *open, unsigned *depth, bool *empty) {
    char byte = *from->bytes;
    if (*depth == JSON_DEPTH_MAX) return false;
    *from = skip_space(skip(*from, 1));
    *empty = from->len > 0 && *from->bytes == (byte == '[' ? ']' : '}');
    if (*empty) {
        *from = skip(*from, 1);
        return true;
    }
    open[(*depth)++] = byte;
    return byte == '[' || take_name(from);
}

bool json_value(struct json from, struct json *value, struct json *rest) {
    char open[JSON_DEPTH_MAX];
    unsigned depth = 0;
    struct json at = skip_space(from);
    const char *start = at.bytes;
    do {
        at = skip_space(at);
        bool empty = true;
        if (at.len > 0 && (*at.bytes == '[' || *at.bytes == '{')) {
            if (!take_opening(&at, open, &depth, &empty)) return false;
        } else {
            size_t len = scalar_length(at);
            if (len == 0) return false;
            at = skip(at, len);
        }
        if (empty && !take_ends(&at, open, &depth)) return false;
    } while (depth > 0);
    *value = (struct json){start, (size_t)(at.bytes - start)};
    *rest = skip_space(at);
    return true;
}

bool json_is_valid(struct json document) {
    struct json value, rest;
    return json_value(document, &value, &rest) && rest.len == 0;
}

bool json_begin_object(struct json object, struct json *rest) {
    *rest = skip_space(object);
    if (!json_is_valid(object) || *rest->bytes != '{') return false;
    *rest = skip_space(skip(*rest, 1));
    return true;
}

bool json_next_member(struct json *rest, struct json_member *member) {
    if (rest->len > 0 && *rest->bytes == ',') *rest = skip_space(skip(*rest, 1));
    if (rest->len == 0 || *rest->bytes != '"') return false;
    member->name = (struct json){rest->bytes, string_length(*rest)};
    return take_name(rest) && json_value(*rest, &member->value, rest);
}

bool json_find(struct json object, const char *name, struct json *value) {
    struct json rest;
    struct json_member member;
    if (!json_begin_object(object, &rest)) return false;
    while (json_next_member(&rest, &member)) {
        if (member.name.len != strlen(name) + 2 || memcmp(member.name.bytes + 1, name, strlen(name))) continue;
        *value = member.value;
        return true;
    }
    return false;
}

bool json_is_string(struct json value) {
    return value.len >= 2 && *value.bytes == '"';
}

static void add_character(struct text *text, uint32_t code) {
    char bytes[4];
    size_t len = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const uint8_t lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = len - 1; i > 0; i--, code >>= 6) bytes[i] = (char)(0x80 | (code & 0x3f));
    bytes[0] = (char)(lead[len] | code);
    text_add(text, bytes, len);
}

static uint32_t read_hex(const char *at) {
    uint32_t code = 0;
    for (int i = 0; i < HEX_DIGITS; i++) code = code << 4 | (uint32_t)hex_value(at[i]);
    return code;
}

/* The character of an escape that begins behind its backslash; returns the bytes that it took. */
static size_t read_escape(const char *at, const char *end, uint32_t *code) {
    static const char names[] = "bfnrt", meanings[] = "\b\f\n\r\t";
    const char *named = strchr(names, *at);
    if (*at != 'u') {
        *code = named ? (uint8_t)meanings[named - names] : (uint8_t)*at;
        return 1;
    }
    *code = read_hex(at + 1);
    if (*code < 0xd800 || *code > 0xdfff) return 5;
    uint32_t low = end - at >= 11 && at[5] == '\\' && at[6] == 'u' ? read_hex(at + 7) : 0;
    bool pair = *code < 0xdc00 && low >= 0xdc00 && low <= 0xdfff;
    *code = pair ? 0x10000 + ((*code - 0xd800) << 10) + (low - 0xdc00) : REPLACEMENT;
    return pair ? 11 : 5;
}

void json_read_string(struct json value, struct text *text) {
    const char *at = value.bytes + 1, *end = value.bytes + value.len - 1;
    while (at < end) {
        const char *escape = memchr(at, '\\', (size_t)(end - at));
        text_add(text, at, (size_t)((escape ? escape : end) - at));
        if (!escape) return;
        uint32_t code;
        at = escape + 1;
        at += read_escape(at, end, &code);
        add_character(text, code);
    }
}
