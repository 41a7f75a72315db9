/* Claims about JSON, against known answers; then a fuzzer of its own: fuzz rounds of mutated documents and random bytes,
 * each in a buffer of its exact size, so that ASan sees a read past its end. Exits 0 if all hold.
 *
 *   check-json SEED ROUNDS */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"

#define CLAIM(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                            \
        }                                                                       \
    } while (0)

static struct json of(const char *text) {
    return (struct json){text, strlen(text)};
}

static void written(const char *bytes, size_t len, const char *wanted) {
    struct text text = {0};
    json_add_string(&text, bytes, len);
    CLAIM(!text.failed && text.len == strlen(wanted) && !memcmp(text.bytes, wanted, text.len));
    CLAIM(json_is_valid((struct json){text.bytes, text.len}));
    text_free(&text);
}

static void read_back(const char *document, const char *wanted, size_t len) {
    struct text text = {0};
    CLAIM(json_is_valid(of(document)) && json_is_string(of(document)));
    json_read_string(of(document), &text);
    CLAIM(!text.failed && text.len == len && (len == 0 || !memcmp(text.bytes, wanted, len)));
    text_free(&text);
}

static void strings_are_written_as_json(void) {
    written("", 0, "\"\"");
    written("say \"hi\"\\\n", 10, "\"say \\\"hi\\\"\\\\\\u000a\"");
    written("\0\x1f\x7f", 3, "\"\\u0000\\u001f\\u007f\"");
    written("\xc3\xa9\xf0\x9f\x98\x80", 6, "\"\xc3\xa9\xf0\x9f\x98\x80\"");
    written("a\xff\xc3", 3, "\"a\\ufffd\\ufffd\"");                   /* no UTF-8, and half of it */
    written("\xc0\x80", 2, "\"\\ufffd\\ufffd\"");                     /* overlong */
    written("\xed\xa0\x80", 3, "\"\\ufffd\\ufffd\\ufffd\"");          /* half a surrogate pair */
    written("\xf4\x90\x80\x80", 4, "\"\\ufffd\\ufffd\\ufffd\\ufffd\""); /* beyond Unicode */
}

static void strings_are_read(void) {
    read_back("\"\"", "", 0);
    read_back("\"a\\n\\t\\\\\\\"\\/\\b\\f\\r\"", "a\n\t\\\"/\b\f\r", 9);
    read_back("\"\\u00e9\\u20AC\\u0000\"", "\xc3\xa9\xe2\x82\xac\0", 6);
    read_back("\"\\ud83d\\ude00!\"", "\xf0\x9f\x98\x80!", 5);
    read_back("\"\\ud83d\"", "\xef\xbf\xbd", 3);
    read_back("\"\\ude00\\ud83dx\"", "\xef\xbf\xbd\xef\xbf\xbdx", 7);
    read_back("\"\\ud83d\\u0041\"", "\xef\xbf\xbd" "A", 4);
}

static void documents_are_told_apart(void) {
    const char *good[] = {"null", " true ", "false", "0", "-1.5e+3", "10", "[]", "{}", "[1,[2,{\"a\":[]}],\"x\"]",
                          "{\"a\":{\"b\":null},\"c\":[{},{}]}", "\t[ ]\n", "{ \"a\" : 1 , \"b\" : 2 }"};
    const char *bad[] = {"", "nul", "01", "1.", "-", "1e", ".5", "[", "]", "[1,]", "[,1]", "{\"a\"}", "{a:1}", "{\"a\":}",
                         "{\"a\":1,}", "[1}", "{\"a\":1]", "\"", "\"\\x\"", "\"\\u12\"", "\"\n\"", "1 2", "[1] x",
                         "\"\xff\"", "{\"a\":1 \"b\":2}", "[1 2]", "{,}", "tru"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) CLAIM(json_is_valid(of(good[i])));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) CLAIM(!json_is_valid(of(bad[i])));
    char deep[2 * JSON_DEPTH_MAX + 3];
    memset(deep, '[', JSON_DEPTH_MAX + 1);
    memset(deep + JSON_DEPTH_MAX + 1, ']', JSON_DEPTH_MAX + 1);
    CLAIM(!json_is_valid((struct json){deep, 2 * JSON_DEPTH_MAX + 2}));
    CLAIM(json_is_valid((struct json){deep + 1, 2 * JSON_DEPTH_MAX}));
}

static void members_are_found(void) {
    struct json value, document = of(" {\"a\": {\"c\": 1}, \"b\" :[1, 2], \"c\":\"x\"} ");
    CLAIM(json_find(document, "c", &value) && value.len == 3 && !memcmp(value.bytes, "\"x\"", 3));
    CLAIM(json_find(document, "b", &value) && value.len == 6);
    CLAIM(!json_find(document, "d", &value) && !json_find(of("[1]"), "a", &value) && !json_find(of("{"), "a", &value));
}

static uint64_t random_state;

static uint64_t random_below(uint64_t bound) { /* xorshift64* */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (random_state * 0x2545f4914f6cdd1dull >> 16) % bound;
}

/* Whatever is valid has members that are valid, and strings that read, and are written, and read the same. */
static void examine(struct json document) {
    struct json rest;
    struct json_member member;
    if (!json_begin_object(document, &rest)) return;
    while (json_next_member(&rest, &member)) {
        CLAIM(json_is_valid(member.name) && json_is_valid(member.value));
        struct text once = {0}, again = {0}, twice = {0};
        json_read_string(member.name, &once);
        json_add_string(&again, once.bytes ? once.bytes : "", once.len);
        json_read_string((struct json){again.bytes, again.len}, &twice);
        CLAIM(once.len == twice.len && (once.len == 0 || !memcmp(once.bytes, twice.bytes, once.len)));
        text_free(&once);
        text_free(&again);
        text_free(&twice);
    }
    CLAIM(rest.len == 1 || (rest.len > 1 && *rest.bytes == '}'));
}

static void one_round(void) {
    static const char *const seeds[] = {"{\"a\":\"\\ud83d\\ude00\",\"b\":[1,2.5e3,null],\"c\":{\"d\":true}}",
                                        "{\"code\":\"x\",\"message\":\"caf\xc3\xa9 \\\"\\\\\",\"hint\":\"\"}", "[[[{}]]]"};
    static const char likely[] = "{}[]\",:\\u0d8tfn \xff\xc3";
    char bytes[256];
    size_t len = random_below(8) ? 0 : random_below(64);
    for (size_t i = 0; i < len; i++) bytes[i] = (char)random_below(256);
    if (len == 0) {
        const char *seed = seeds[random_below(3)];
        len = strlen(seed) - random_below(random_below(4) ? 1 : strlen(seed));
        memcpy(bytes, seed, len);
        for (uint64_t left = random_below(5); left > 0 && len > 0; left--)
            bytes[random_below(len)] = random_below(2) ? likely[random_below(sizeof likely - 1)] : (char)random_below(256);
    }
    char *copy = malloc(len ? len : 1);
    CLAIM(copy);
    memcpy(copy, bytes, len);
    examine((struct json){copy, len});
    struct text text = {0};
    json_add_string(&text, copy, len);
    CLAIM(json_is_valid((struct json){text.bytes, text.len}));
    text_free(&text);
    free(copy);
}

int main(int argc, char **argv) {
    random_state = (argc > 1 ? strtoull(argv[1], NULL, 10) : 1) * 2 + 1;
    uint64_t rounds = argc > 2 ? strtoull(argv[2], NULL, 10) : 30000;
    strings_are_written_as_json();
    strings_are_read();
    documents_are_told_apart();
    members_are_found();
    for (uint64_t i = 0; i < rounds; i++) one_round();
    printf("json: all claims hold, %" PRIu64 " rounds\n", rounds);
    return 0;
}
