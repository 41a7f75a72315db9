/* torpor-copy-out and torpor-copy-in: a file or a directory, out of the sandbox and into it, as records on the worker's
 * socket (docs/init-protocol.md). Both block: the socket's window is the only bound that they need.
 *
 * A copy that comes in is made beside its place, under a name of its own, and renamed when it is whole. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bytes.h"
#include "record.h"
#include "worker.h"

enum { SOCKET_FD = 0, ENTRY_HEAD_BYTES = 20, PATH_BYTES_MAX = 4096, DEPTH_MAX = 256 };

static uint8_t record[RECORD_BYTES_MAX];

static void say_encoded(size_t len) {
    for (size_t at = 0; at < len;) {
        ssize_t put = send(SOCKET_FD, record + at, len - at, MSG_NOSIGNAL);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) exit(0); /* nobody listens any more; what is half made goes at exit */
        at += (size_t)put;
    }
}

static void say(uint8_t type, const void *payload, size_t len) {
    say_encoded(record_encode(type, payload, len, record));
}

/* The last record; then the host reads it, closes, and this ends. */
static _Noreturn void finish(size_t len) {
    char rest[4096];
    say_encoded(len);
    shutdown(SOCKET_FD, SHUT_WR);
    while (recv(SOCKET_FD, rest, sizeof rest, 0) > 0) continue;
    exit(0);
}

static _Noreturn void fail(int error, const char *verb, const char *path) {
    char text[512];
    snprintf(text, sizeof text, "cannot %s %.300s: %s", verb, path, strerror(error));
    finish(record_failure(error, text, record));
}

/* ---- out ---- */

static void say_entry(uint8_t type, const struct stat *info, const char *path, const char *target) {
    uint8_t payload[ENTRY_HEAD_BYTES + 2 * PATH_BYTES_MAX];
    size_t path_len = strlen(path) + 1, target_len = strlen(target);
    if (path_len + target_len > 2 * PATH_BYTES_MAX) return;
    put_u32(payload, info->st_mode & 0777);
    put_u64(payload + 4, (uint64_t)(info->st_mtim.tv_sec * 1000000000ll + info->st_mtim.tv_nsec));
    put_u64(payload + 12, (uint64_t)info->st_size);
    memcpy(payload + ENTRY_HEAD_BYTES, path, path_len);
    memcpy(payload + ENTRY_HEAD_BYTES + path_len, target, target_len);
    say(type, payload, ENTRY_HEAD_BYTES + path_len + target_len);
}

static void leave_out(const char *path, const char *reason) {
    static const struct stat nothing;
    say_entry('N', &nothing, path, reason);
}

static void send_file(int fd, const struct stat *info, const char *path) {
    say_entry('A', info, path, "");
    for (;;) {
        ssize_t got = read(fd, record + RECORD_HEADER_BYTES, RECORD_PAYLOAD_MAX);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) fail(errno, "read", path);
        if (got == 0) break;
        say('B', record + RECORD_HEADER_BYTES, (size_t)got);
    }
    say('Z', NULL, 0);
}

static void send_entry(int fd, const char *path, unsigned depth);

static void send_link(int parent, const char *name, const struct stat *info, const char *path) {
    char target[PATH_BYTES_MAX];
    ssize_t len = readlinkat(parent, name, target, sizeof target - 1);
    if (len < 0) {
        leave_out(path, strerror(errno));
        return;
    }
    target[len] = 0;
    say_entry('L', info, path, target);
}

static void send_child(int parent, const char *name, const char *path, unsigned depth) {
    struct stat info;
    if (fstatat(parent, name, &info, AT_SYMLINK_NOFOLLOW) < 0) return; /* gone meanwhile */
    if (S_ISLNK(info.st_mode)) {
        send_link(parent, name, &info, path);
        return;
    }
    bool sendable = S_ISREG(info.st_mode) || S_ISDIR(info.st_mode);
    int fd = sendable ? openat(parent, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC) : -1;
    if (fd < 0)
        leave_out(path, sendable ? strerror(errno) : "it is no file, directory or link");
    else
        send_entry(fd, path, depth);
}

/* Sends what is open, and closes it. */
static void send_entry(int fd, const char *path, unsigned depth) {
    struct stat info;
    if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode)) {
        send_file(fd, &info, path);
        close(fd);
        return;
    }
    DIR *dir = S_ISDIR(info.st_mode) && depth < DEPTH_MAX ? fdopendir(fd) : NULL;
    if (!dir) {
        leave_out(path, depth < DEPTH_MAX ? "it is no file, directory or link" : "it lies too deep");
        close(fd);
        return;
    }
    say_entry('D', &info, path, "");
    for (struct dirent *entry; (entry = readdir(dir));) {
        char below[PATH_BYTES_MAX];
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        int len = snprintf(below, sizeof below, "%s%s%s", path, *path ? "/" : "", entry->d_name);
        if (len < (int)sizeof below)
            send_child(fd, entry->d_name, below, depth + 1);
        else
            leave_out(path, "a path in it is too long");
    }
    closedir(dir);
}

static bool send_wanted(void *context, uint8_t type, const uint8_t *payload, size_t len) {
    char path[PATH_BYTES_MAX];
    struct stat info;
    (void)context;
    if (type != 'R' || len == 0 || len >= sizeof path) return false;
    memcpy(path, payload, len);
    path[len] = 0;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info) < 0) fail(errno, "read", path);
    if (!S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode)) fail(EINVAL, "copy", path);
    send_entry(fd, "", 0);
    finish(record_encode('K', NULL, 0, record));
}

/* ---- in ---- */

static struct incoming {
    char target[3 * PATH_BYTES_MAX], stage[3 * PATH_BYTES_MAX + 32]; /* the place, and the name beside it until then */
    int root; /* the stage, once it is a directory */
    int file; /* that is being written */
    bool begun;
    struct stat meta;
} incoming = {.root = -1, .file = -1};

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *where) {
    (void)info, (void)kind, (void)where;
    return remove(path);
}

static void remove_stage(void) {
    if (incoming.begun) nftw(incoming.stage, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* The place is the path itself, or what it is called in the directory that the path is. */
static void take_target(const uint8_t *payload, size_t len) {
    char text[PATH_BYTES_MAX + 1];
    struct stat info;
    if (len == 0 || len >= PATH_BYTES_MAX || !memchr(payload, 0, len)) fail(EINVAL, "copy to", "this path");
    memcpy(text, payload, len);
    text[len] = 0;
    const char *name = text + strlen(text) + 1;
    bool within = stat(text, &info) == 0 && S_ISDIR(info.st_mode);
    snprintf(incoming.target, sizeof incoming.target, "%s%s%s", text, within ? "/" : "", within ? name : "");
    const char *slash = strrchr(incoming.target, '/');
    int parent_len = slash ? (int)(slash - incoming.target) + 1 : 0;
    snprintf(incoming.stage, sizeof incoming.stage, "%.*s.torpor-%ld", parent_len, incoming.target, (long)getpid());
    if (lstat(incoming.target, &info) == 0 && S_ISDIR(info.st_mode)) fail(EEXIST, "copy to", incoming.target);
}

/* The directory that an entry lies in, opened one component at a time; `*name` is its own name. */
static int open_parent(const char *path, const char **name) {
    int fd = dup(incoming.root);
    for (const char *slash; fd >= 0 && (slash = strchr(path, '/')); path = slash + 1) {
        char part[256];
        if (slash - path >= (long)sizeof part || slash == path) fail(EINVAL, "make", path);
        memcpy(part, path, (size_t)(slash - path));
        part[slash - path] = 0;
        int below = openat(fd, part, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        close(fd);
        fd = below;
    }
    *name = path;
    if (fd < 0) fail(errno, "make", path);
    return fd;
}

static void set_meta(int fd) {
    struct timespec times[2] = {incoming.meta.st_mtim, incoming.meta.st_mtim};
    fchmod(fd, incoming.meta.st_mode);
    futimens(fd, times);
}

static void make_entry(uint8_t type, const char *path, const char *target) {
    const char *name = incoming.stage;
    int parent = *path ? open_parent(path, &name) : AT_FDCWD, made = 0;
    if (!*path && incoming.begun) fail(EEXIST, "make", incoming.target);
    incoming.begun = true;
    if (type == 'D')
        made = mkdirat(parent, name, incoming.meta.st_mode | 0700);
    else if (type == 'L')
        made = symlinkat(target, parent, name);
    else
        made = incoming.file = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (made < 0) fail(errno, "make", path);
    if (type == 'D' && !*path) incoming.root = open(name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (*path) close(parent);
}

static void take_entry(uint8_t type, const uint8_t *payload, size_t len) {
    static char text[RECORD_PAYLOAD_MAX + 1];
    if (len <= ENTRY_HEAD_BYTES || incoming.file >= 0) fail(EINVAL, "read", "an entry");
    memcpy(text, payload + ENTRY_HEAD_BYTES, len - ENTRY_HEAD_BYTES);
    text[len - ENTRY_HEAD_BYTES] = 0;
    incoming.meta.st_mode = get_u32(payload) & 0777;
    int64_t mtime_ns = (int64_t)get_u64(payload + 4);
    incoming.meta.st_mtim = (struct timespec){.tv_sec = mtime_ns / 1000000000, .tv_nsec = mtime_ns % 1000000000};
    if (incoming.meta.st_mtim.tv_nsec < 0) incoming.meta.st_mtim.tv_nsec = 0;
    size_t path_len = strlen(text);
    make_entry(type, text, path_len + 1 < len - ENTRY_HEAD_BYTES ? text + path_len + 1 : "");
}

static void take_bytes(const uint8_t *bytes, size_t len) {
    while (len > 0) {
        ssize_t put = write(incoming.file, bytes, len);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) fail(errno, "write", incoming.target);
        bytes += put;
        len -= (size_t)put;
    }
}

static bool take_record(void *context, uint8_t type, const uint8_t *payload, size_t len) {
    (void)context;
    if (!*incoming.target && type != 'R') return false;
    switch (type) {
    case 'R': take_target(payload, len); break;
    case 'D':
    case 'A':
    case 'L': take_entry(type, payload, len); break;
    case 'B': take_bytes(payload, len); break;
    case 'Z':
        set_meta(incoming.file);
        if (close(incoming.file) < 0) fail(errno, "write", incoming.target);
        incoming.file = -1;
        break;
    case 'K':
        if (!incoming.begun || incoming.file >= 0) return false;
        if (rename(incoming.stage, incoming.target) < 0) fail(errno, "make", incoming.target);
        incoming.begun = false;
        finish(record_encode('K', NULL, 0, record));
    default: break; /* a later version's */
    }
    return true;
}

static int serve(record_handler *handle) {
    static struct record_reader reader;
    static uint8_t bytes[65536];
    for (;;) {
        ssize_t got = recv(SOCKET_FD, bytes, sizeof bytes, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0 || !record_reader_feed(&reader, bytes, (size_t)got, handle, NULL)) return 0;
    }
}

int copy_out_main(int argc, char **argv) {
    (void)argc, (void)argv;
    return serve(send_wanted);
}

int copy_in_main(int argc, char **argv) {
    (void)argc, (void)argv;
    atexit(remove_stage);
    exit(serve(take_record)); /* and what is half made goes */
}
