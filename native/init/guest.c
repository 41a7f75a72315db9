/* torpor-guest: asks Torpor from a shell. Each command is a row of the table: its route, its options, how they become a
 * request and what of the answer is printed. A new route is a new row. The contract is docs/torpor-guest.md. */
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "http.h"
#include "json.h"

enum { DONE = 0, REFUSED = 1, USAGE = 2, TIMED_OUT = 3, NO_SUCH_ROUTE = 4, UNREACHABLE = 69 };
enum { WORDS_MAX = 256, CHOICES_MAX = 64, STDIN_BYTES_MAX = 1 << 20, ATTEMPTS_MAX = 5, ATTEMPT_WAIT_NS = 200000000 };

/* What the command line said. */
struct wish {
    const char *words[WORDS_MAX]; /* the arguments that are no options */
    int word_count;
    const char *choices[CHOICES_MAX];
    size_t choice_lengths[CHOICES_MAX];
    int choice_count;
    bool free_text, as_json;
    const char *timeout, *until;
    struct sockaddr_in address;
};

struct command {
    const char *name, *method, *path;
    int words_min, words_max;
    const char *options; /* letters of those that it takes: c(hoices) f(ree-text) t(imeout) u(ntil) d(ata) */
    bool (*build)(const struct wish *wish, struct text *body); /* NULL: no body; false: the words make no request */
    const char *answer; /* the member that is printed; NULL: all, one a line; "": nothing */
    const char *usage, *about;
};

static void add_name(struct text *body, const char *name) {
    text_add_string(body, body->len == 0 ? "{" : ",");
    json_add_string(body, name, strlen(name));
    text_add_string(body, ":");
}

static void add_text(struct text *body, const char *name, const char *value) {
    add_name(body, name);
    json_add_string(body, value, strlen(value));
}

static void add_raw(struct text *body, const char *name, const char *json) {
    add_name(body, name);
    text_add_string(body, json);
}

static bool end_body(struct text *body) {
    text_add_string(body, body->len == 0 ? "{}" : "}");
    return !body->failed;
}

/* A JSON number that is not negative: what a number of seconds is. */
static bool is_seconds(const char *text) {
    struct json json = {text, strlen(text)};
    return text[0] >= '0' && text[0] <= '9' && json_is_valid(json);
}

static bool add_timeout(const struct wish *wish, struct text *body) {
    if (!wish->timeout) return true;
    if (!is_seconds(wish->timeout)) return false;
    add_raw(body, "timeout_seconds", wish->timeout);
    return true;
}

/* A word, or all of stdin when it is `-`. */
static bool add_word_or_stdin(struct text *body, const char *name, const char *word) {
    static char bytes[STDIN_BYTES_MAX + 1];
    if (strcmp(word, "-") != 0) {
        add_text(body, name, word);
        return true;
    }
    size_t len = fread(bytes, 1, sizeof bytes, stdin);
    if (len == sizeof bytes || ferror(stdin)) {
        fprintf(stderr, "torpor-guest: cannot read stdin: %s\n",
                ferror(stdin) ? strerror(errno) : "it has more than 1 MiB");
        return false;
    }
    add_name(body, name);
    json_add_string(body, bytes, len);
    return true;
}

static bool build_empty(const struct wish *wish, struct text *body) {
    (void)wish;
    return end_body(body);
}

static bool build_note(const struct wish *wish, struct text *body) {
    return add_word_or_stdin(body, "text", wish->words[0]) && end_body(body);
}

static bool build_ask(const struct wish *wish, struct text *body) {
    if (!add_word_or_stdin(body, "question", wish->words[0])) return false;
    for (int i = 0; i < wish->choice_count; i++) {
        if (i == 0) add_raw(body, "choices", "[");
        if (i > 0) text_add_string(body, ",");
        json_add_string(body, wish->choices[i], wish->choice_lengths[i]);
    }
    if (wish->choice_count > 0) text_add_string(body, "]");
    if (wish->free_text) add_raw(body, "free_text", "true");
    return add_timeout(wish, body) && end_body(body);
}

static bool build_sleep(const struct wish *wish, struct text *body) {
    if (wish->until ? wish->word_count > 0 : wish->word_count == 0 || !is_seconds(wish->words[0])) return false;
    if (wish->until)
        add_text(body, "until", wish->until);
    else
        add_raw(body, "seconds", wish->words[0]);
    return end_body(body);
}

static bool build_send(const struct wish *wish, struct text *body) {
    return add_word_or_stdin(body, "text", wish->words[0]) && end_body(body);
}

static bool build_spawn(const struct wish *wish, struct text *body) {
    add_raw(body, "command", "");
    for (int i = 0; i < wish->word_count; i++) {
        text_add_string(body, i == 0 ? "[" : ",");
        json_add_string(body, wish->words[i], strlen(wish->words[i]));
    }
    text_add_string(body, "]");
    return end_body(body);
}

static bool build_receive(const struct wish *wish, struct text *body) {
    return add_timeout(wish, body) && end_body(body);
}

static const struct command commands[] = {
    {"whoami", "GET", "/torpor/v1/session", 0, 0, "", NULL, NULL, "",
     "Print the session's id and name, which life of the sandbox this is, and the newest checkpoint."},
    {"checkpoint", "POST", "/torpor/v1/checkpoint", 0, 0, "", build_empty, "checkpoint", "",
     "Save memory, files and connections now; print the checkpoint's number when that is durable."},
    {"note", "POST", "/torpor/v1/notes", 1, 1, "", build_note, "seq", "TEXT",
     "Write a text into the session's log; print the event's number. TEXT may be - for stdin."},
    {"ask", "POST", "/torpor/v1/ask", 1, 1, "cft", build_ask, "answer",
     "QUESTION [--choices A,B,...] [--choice A]... [--free-text] [--timeout SECONDS]",
     "Ask a person; wait, however long it takes, and print the answer."},
    {"sleep", "POST", "/torpor/v1/sleep", 0, 1, "u", build_sleep, "", "SECONDS | --until TIME",
     "Wait that long, or until a time (RFC 3339), over restores too."},
    {"send", "POST", "/torpor/v1/send", 1, 1, "", build_send, "", "TEXT",
     "Send a message out of the session. TEXT may be - for stdin."},
    {"spawn", "POST", "/torpor/v1/spawn", 1, WORDS_MAX, "", build_spawn, "session", "-- COMMAND...",
     "Begin a session of its own with a copy of the workspace; print its id."},
    {"receive", "POST", "/torpor/v1/receive", 0, 0, "t", build_receive, "text", "[--timeout SECONDS]",
     "Wait for the next message to the session, and print its text."},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static void help(FILE *to) {
    fputs("usage: torpor-guest COMMAND [OPTIONS]\n\nAsks Torpor, from inside of a session. The answer to the same question is the same after "
          "a restore.\n\n", to);
    for (int i = 0; i < COMMANDS; i++) {
        const struct command *command = &commands[i];
        fprintf(to, "  %s%s%s\n      %s\n", command->name, *command->usage ? " " : "", command->usage, command->about);
    }
    fputs("\nEvery command takes:\n"
          "  --json                    print the whole answer, as JSON on one line; errors too\n"
          "  --address IP:PORT         where Torpor listens (default: 127.0.0.1:4100)\n"
          "  --help                    print this\n\n"
          "Exit statuses: 0 done, 1 refused by Torpor, 2 wrong usage, 3 the timeout passed first, 4 this session's node has\n"
          "no such command yet, 69 Torpor cannot be reached.\n", to);
}

static int wrong_usage(const struct command *command, const char *what, const char *which) {
    if (what) fprintf(stderr, "torpor-guest: %s%s\n", what, which);
    if (command)
        fprintf(stderr, "usage: torpor-guest %s %s\n", command->name, command->usage);
    else
        fputs("usage: torpor-guest COMMAND [OPTIONS]; --help lists them\n", stderr);
    return USAGE;
}

static void add_choices(struct wish *wish, const char *list, bool split) {
    while (list && wish->choice_count < CHOICES_MAX) {
        const char *comma = split ? strchr(list, ',') : NULL;
        wish->choices[wish->choice_count] = list;
        wish->choice_lengths[wish->choice_count++] = comma ? (size_t)(comma - list) : strlen(list);
        list = comma ? comma + 1 : NULL;
    }
}

static bool read_address(struct wish *wish, const char *text) {
    char host[INET_ADDRSTRLEN], *rest;
    const char *colon = strrchr(text, ':');
    if (!colon || (size_t)(colon - text) >= sizeof host) return false;
    memcpy(host, text, (size_t)(colon - text));
    host[colon - text] = 0;
    unsigned long port = strtoul(colon + 1, &rest, 10);
    wish->address.sin_family = AF_INET;
    wish->address.sin_port = htons((uint16_t)port);
    return colon[1] >= '0' && colon[1] <= '9' && !*rest && port <= UINT16_MAX &&
           inet_pton(AF_INET, host, &wish->address.sin_addr) == 1;
}

/* Takes an option that has a value; false: there is no such one, or its value is none. */
static bool take_value(struct wish *wish, const struct command *command, const char *name, const char *value) {
    static const struct {
        const char *name;
        char letter;
    } options[] = {{"--choices", 'c'}, {"--choice", 'c'}, {"--timeout", 't'}, {"--until", 'u'}};
    char letter = 0;
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        if (!strcmp(name, options[i].name)) letter = options[i].letter;
    if (!strcmp(name, "--address")) return value && read_address(wish, value);
    if (!letter || !value || !strchr(command->options, letter)) return false;
    if (letter == 'c') add_choices(wish, value, !strcmp(name, "--choices"));
    if (letter == 't') wish->timeout = value;
    if (letter == 'u') wish->until = value;
    return true;
}

/* DONE, or USAGE after saying why. */
static int read_arguments(const struct command *command, char **argv, struct wish *wish) {
    bool words_only = false;
    (void)read_address(wish, "127.0.0.1:4100");
    for (; *argv; argv++) {
        const char *word = *argv;
        if (!words_only && !strcmp(word, "--")) {
            words_only = true;
        } else if (words_only || word[0] != '-' || !word[1]) {
            if (wish->word_count == command->words_max) return wrong_usage(command, "too many arguments: ", word);
            wish->words[wish->word_count++] = word;
        } else if (!strcmp(word, "--json")) {
            wish->as_json = true;
        } else if (!strcmp(word, "--free-text") && strchr(command->options, 'f')) {
            wish->free_text = true;
        } else {
            if (!take_value(wish, command, word, argv[1])) return wrong_usage(command, "cannot use ", word);
            argv++;
        }
    }
    return wish->word_count < command->words_min ? wrong_usage(command, NULL, "") : DONE;
}

static void print_text(FILE *to, const struct text *text) {
    if (text->len > 0) fwrite(text->bytes, 1, text->len, to);
}

/* A string as what it means, anything else as it stands. */
static void print_value(FILE *to, struct json value) {
    struct text text = {0};
    if (json_is_string(value))
        json_read_string(value, &text);
    else
        text_add(&text, value.bytes, value.len);
    print_text(to, &text);
    text_free(&text);
}

static void print_members(struct json body) {
    struct json rest;
    struct json_member member;
    if (!json_begin_object(body, &rest)) return;
    while (json_next_member(&rest, &member)) {
        print_value(stdout, member.name);
        fputs(": ", stdout);
        print_value(stdout, member.value);
        fputs("\n", stdout);
    }
}

static bool is_null(struct json value) {
    return value.len == 4 && !memcmp(value.bytes, "null", 4);
}

static void print_answer(const struct command *command, struct json body) {
    struct json value;
    if (!command->answer) {
        print_members(body);
    } else if (*command->answer) {
        if (!json_find(body, command->answer, &value) || is_null(value)) return;
        print_value(stdout, value);
        fputs("\n", stdout);
    }
}

static int say_refusal(const struct command *command, const struct answer *answer, struct json body) {
    struct json code = {"", 0}, message = {"", 0}, hint = {"", 0};
    bool known = json_find(body, "code", &code) && json_find(body, "message", &message);
    if (answer->status == 404) {
        fprintf(stderr, "torpor-guest: cannot %s: the session's node knows no %s, it is of another version of Torpor\n",
                command->name, command->path);
        return NO_SUCH_ROUTE;
    }
    if (!known) {
        fprintf(stderr, "torpor-guest: cannot %s: Torpor answered with status %d\n", command->name, answer->status);
        return REFUSED;
    }
    fputs("error ", stderr);
    print_value(stderr, code);
    fputs(": ", stderr);
    print_value(stderr, message);
    if (json_find(body, "hint", &hint) && hint.len > 2) {
        fputs("\n  hint: ", stderr);
        print_value(stderr, hint);
    }
    fputs("\n", stderr);
    return REFUSED;
}

static bool has_timed_out(struct json body) {
    struct json state;
    return json_find(body, "state", &state) && state.len == 11 && !memcmp(state.bytes, "\"timed_out\"", 11);
}

static int conclude(const struct command *command, const struct wish *wish, const struct answer *answer) {
    struct json body = {answer->body.bytes ? answer->body.bytes : "", answer->body.len};
    int status = DONE;
    if (answer->status < 200 || answer->status > 299) status = say_refusal(command, answer, body);
    if (wish->as_json) {
        print_text(stdout, &answer->body);
        fputs("\n", stdout);
    }
    if (status != DONE) return status;
    if (has_timed_out(body)) return TIMED_OUT;
    if (!wish->as_json) print_answer(command, body);
    return DONE;
}

/* Asks until there is an answer: a connection that was cut off had no whole one, and Torpor joins the next request with the
 * first, so that nothing is done twice. */
static int ask(const struct command *command, const struct wish *wish, const struct text *body) {
    enum http_outcome outcome = HTTP_CUT_OFF;
    struct answer answer = {0};
    for (int attempt = 0; attempt < ATTEMPTS_MAX && outcome == HTTP_CUT_OFF; attempt++) {
        struct timespec wait = {.tv_nsec = ATTEMPT_WAIT_NS * (attempt > 0)};
        nanosleep(&wait, NULL);
        text_free(&answer.body);
        outcome = http_ask(&wish->address, command->method, command->path, body, &answer);
    }
    int status = UNREACHABLE;
    if (outcome == HTTP_ANSWERED)
        status = conclude(command, wish, &answer);
    else if (outcome == HTTP_UNREACHABLE)
        fprintf(stderr, "torpor-guest: cannot reach Torpor: %s\n", strerror(errno));
    else
        fprintf(stderr, "torpor-guest: cannot read Torpor's answer: %s\n",
                outcome == HTTP_BROKEN ? "it is no HTTP, or longer than 16 MiB" : "the connection was cut off");
    text_free(&answer.body);
    return status;
}

int guest_main(int argc, char **argv) {
    const struct command *command = NULL;
    struct wish wish = {0};
    struct text body = {0};
    bool wants_help = argc > 1 && (!strcmp(argv[1], "help") || !strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"));
    for (int i = 2; i < argc && strcmp(argv[i], "--") != 0; i++) wants_help |= !strcmp(argv[i], "--help");
    if (wants_help) {
        help(stdout);
        return DONE;
    }
    for (int i = 0; argc > 1 && i < COMMANDS; i++)
        if (!strcmp(argv[1], commands[i].name)) command = &commands[i];
    if (!command) return wrong_usage(NULL, argc > 1 ? "there is no command " : NULL, argc > 1 ? argv[1] : "");
    int status = read_arguments(command, argv + 2, &wish);
    if (status == DONE && command->build && !command->build(&wish, &body))
        status = wrong_usage(command, "cannot make a request of this", "");
    if (status == DONE) status = ask(command, &wish, command->build ? &body : NULL);
    text_free(&body);
    if (fflush(stdout) == 0) return status;
    fprintf(stderr, "torpor-guest: cannot write: %s\n", strerror(errno));
    return REFUSED;
}
