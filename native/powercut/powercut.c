/* powercut: an LD_PRELOAD library that records what a program does to the files below one directory.
 *
 * TORPOR_POWERCUT_ROOT  the directory, which must be empty at the start (a real path, without symbolic links)
 * TORPOR_POWERCUT_LOG   the record, outside of it; src/torpor/testing/powercut.py reads it
 *
 * Only what changes a disk is recorded: writes, sizes, names, and syncs. Each call is made and recorded under one lock
 * over all recorded processes, so the record's order is the order in which things happened. What can't be seen (stores
 * through a shared writable mapping) is recorded as such, and the reader decides. A call that this library does not
 * know (io_uring, a static program) is invisible: it is for programs whose calls are known.
 *
 * A record is, little-endian: u32 length of the rest, u8 kind, u64 inode, u64 offset, u32 lengths of path, other path and
 * data, then these three. Kinds: see enum kind.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind {
    CREATE = 'C', WRITE = 'W', RESIZE = 'T', SYNC = 'S', RENAME = 'R', UNLINK = 'U', LINK = 'L', MKDIR = 'M', RMDIR = 'D',
    UNSEEN = 'X',
};

#define HEADER_BYTES (1 + 8 + 8 + 3 * 4)
#define REAL(name) ((typeof(&name))real(#name))

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int log_descriptor = -1;

static void *real(const char *name) {
    void *symbol = dlsym(RTLD_NEXT, name);
    if (symbol == NULL) abort();
    return symbol;
}

/* A child shares its parent's open file, and with it the parent's flock: it needs one of its own. */
static void open_log(void) {
    const char *path = getenv("TORPOR_POWERCUT_LOG");
    if (path == NULL || root_length == 0) return;
    if (log_descriptor >= 0) close(log_descriptor);
    int low = REAL(open)(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (low < 0) abort();
    log_descriptor = fcntl(low, F_DUPFD_CLOEXEC, 200); /* out of the way of programs that count theirs */
    close(low);
    if (log_descriptor < 0) abort();
}

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("TORPOR_POWERCUT_ROOT");
    if (path == NULL || strlen(path) >= sizeof root) return;
    strcpy(root, path);
    root_length = strlen(root);
    open_log();
    pthread_atfork(NULL, NULL, open_log);
}

static void lock(void) {
    pthread_mutex_lock(&mutex);
    if (log_descriptor >= 0) flock(log_descriptor, LOCK_EX);
}

static void unlock(void) {
    int kept = errno;
    if (log_descriptor >= 0) flock(log_descriptor, LOCK_UN);
    pthread_mutex_unlock(&mutex);
    errno = kept;
}

static bool below_root(const char *path) {
    return root_length > 0 && strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

/* The path that a descriptor was opened by, as the kernel says it now. */
static bool path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return false;
    path[length] = 0;
    return true;
}

static bool watched(int descriptor, char *path, struct stat *status) {
    return log_descriptor >= 0 && path_of(descriptor, path) && below_root(path) && fstat(descriptor, status) == 0;
}

/* An absolute path without links in its directories; false when it is not below the root. */
static bool resolve(int directory, const char *name, char *path) {
    char joined[2 * PATH_MAX], parent[PATH_MAX];
    if (log_descriptor < 0) return false;
    if (name[0] == '/') {
        snprintf(joined, sizeof joined, "%s", name);
    } else if (directory == AT_FDCWD) {
        if (getcwd(parent, sizeof parent) == NULL) return false;
        snprintf(joined, sizeof joined, "%s/%s", parent, name);
    } else {
        if (!path_of(directory, parent)) return false;
        snprintf(joined, sizeof joined, "%s/%s", parent, name);
    }
    size_t length = strlen(joined);
    while (length > 1 && joined[length - 1] == '/') joined[--length] = 0;
    char *slash = strrchr(joined, '/');
    *slash = 0;
    if (realpath(joined[0] ? joined : "/", parent) == NULL) return false;
    return snprintf(path, PATH_MAX, "%s/%s", parent, slash + 1) < PATH_MAX && below_root(path);
}

static unsigned char *put(unsigned char *at, uint64_t value, size_t size) {
    for (size_t n = 0; n < size; n++) *at++ = (unsigned char)(value >> (8 * n));
    return at;
}

static void record(enum kind kind, uint64_t inode, uint64_t offset, const char *path, const char *other,
                   const void *data, size_t size) {
    unsigned char header[4 + HEADER_BYTES];
    size_t path_length = strlen(path), other_length = strlen(other);
    unsigned char *at = put(header, HEADER_BYTES + path_length + other_length + size, 4);
    *at++ = (unsigned char)kind;
    at = put(put(at, inode, 8), offset, 8);
    put(put(put(at, path_length, 4), other_length, 4), size, 4);
    struct iovec parts[] = {
        {header, sizeof header}, {(void *)path, path_length}, {(void *)other, other_length}, {(void *)data, size},
    };
    ssize_t whole = (ssize_t)(sizeof header + path_length + other_length + size);
    if (REAL(writev)(log_descriptor, parts, 4) != whole) abort(); /* a record that is cut off would lie */
}

/* What a write left in the file: read back, so that one function serves every way of writing. */
static void record_range(int descriptor, const struct stat *status, const char *path, off_t offset, size_t size) {
    unsigned char buffer[65536];
    while (size > 0) {
        int reader = descriptor;
        char name[64];
        snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
        if ((fcntl(descriptor, F_GETFL) & O_ACCMODE) == O_WRONLY) reader = REAL(open)(name, O_RDONLY | O_CLOEXEC);
        if (reader < 0) abort();
        ssize_t got = pread(reader, buffer, size < sizeof buffer ? size : sizeof buffer, offset);
        if (reader != descriptor) close(reader);
        if (got <= 0) abort();
        record(WRITE, status->st_ino, (uint64_t)offset, path, "", buffer, (size_t)got);
        offset += got;
        size -= (size_t)got;
    }
}

/* --- writing ------------------------------------------------------------------------------------------------------ */

static ssize_t wrote(int descriptor, ssize_t written, off_t offset) {
    char path[PATH_MAX];
    struct stat status;
    int kept = errno;
    if (written > 0 && watched(descriptor, path, &status) && S_ISREG(status.st_mode)) {
        if (offset < 0) offset = lseek(descriptor, 0, SEEK_CUR) - written;
        record_range(descriptor, &status, path, offset, (size_t)written);
    }
    errno = kept;
    return written;
}

/* Whether a call must be watched at all: pipes and sockets must not wait under the lock. */
static bool is_watched_file(int descriptor) {
    char path[PATH_MAX];
    struct stat status;
    int kept = errno;
    bool answer = watched(descriptor, path, &status) && (S_ISREG(status.st_mode) || S_ISDIR(status.st_mode));
    errno = kept;
    return answer;
}

#define WRITER(declaration, descriptor, call, offset)     \
    declaration {                                         \
        if (!is_watched_file(descriptor)) return call;    \
        lock();                                           \
        ssize_t written = wrote(descriptor, call, offset); \
        unlock();                                         \
        return written;                                   \
    }

WRITER(ssize_t write(int fd, const void *data, size_t size), fd, REAL(write)(fd, data, size), -1)
WRITER(ssize_t writev(int fd, const struct iovec *parts, int count), fd, REAL(writev)(fd, parts, count), -1)
WRITER(ssize_t pwrite(int fd, const void *data, size_t size, off_t at), fd, REAL(pwrite)(fd, data, size, at), at)
WRITER(ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at), fd, REAL(pwrite64)(fd, data, size, at), at)
WRITER(ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t at), fd, REAL(pwritev)(fd, parts, n, at), at)
WRITER(ssize_t pwritev64(int fd, const struct iovec *parts, int n, off64_t at), fd, REAL(pwritev64)(fd, parts, n, at), at)
WRITER(ssize_t sendfile(int fd, int from, off_t *at, size_t size), fd, REAL(sendfile)(fd, from, at, size), -1)
WRITER(ssize_t sendfile64(int fd, int from, off64_t *at, size_t size), fd, REAL(sendfile64)(fd, from, at, size), -1)

ssize_t copy_file_range(int from, off64_t *from_at, int fd, off64_t *at, size_t size, unsigned flags) {
    if (!is_watched_file(fd)) return REAL(copy_file_range)(from, from_at, fd, at, size, flags);
    lock();
    off64_t start = at != NULL ? *at : -1;
    ssize_t written = wrote(fd, REAL(copy_file_range)(from, from_at, fd, at, size, flags), start);
    unlock();
    return written;
}

/* --- sizes and syncs ------------------------------------------------------------------------------------------------ */

static int changed(int descriptor, int result, enum kind kind) {
    char path[PATH_MAX];
    struct stat status;
    int kept = errno;
    if (result == 0 && watched(descriptor, path, &status)) {
        record(kind, status.st_ino, kind == RESIZE ? (uint64_t)status.st_size : 0, path, "", NULL, 0);
    }
    errno = kept;
    return result;
}

#define CHANGER(declaration, descriptor, call, kind)   \
    declaration {                                      \
        if (!is_watched_file(descriptor)) return call; \
        lock();                                        \
        int result = changed(descriptor, call, kind);  \
        unlock();                                      \
        return result;                                 \
    }

CHANGER(int ftruncate(int fd, off_t size), fd, REAL(ftruncate)(fd, size), RESIZE)
CHANGER(int ftruncate64(int fd, off64_t size), fd, REAL(ftruncate64)(fd, size), RESIZE)
CHANGER(int posix_fallocate(int fd, off_t at, off_t size), fd, REAL(posix_fallocate)(fd, at, size), RESIZE)
CHANGER(int posix_fallocate64(int fd, off64_t at, off64_t size), fd, REAL(posix_fallocate64)(fd, at, size), RESIZE)
CHANGER(int fsync(int fd), fd, REAL(fsync)(fd), SYNC)
CHANGER(int fdatasync(int fd), fd, REAL(fdatasync)(fd), SYNC)

static int truncated(const char *name, int result) {
    char path[PATH_MAX];
    struct stat status;
    int kept = errno;
    if (result == 0 && resolve(AT_FDCWD, name, path) && stat(path, &status) == 0) {
        record(RESIZE, status.st_ino, (uint64_t)status.st_size, path, "", NULL, 0);
    }
    errno = kept;
    unlock();
    return result;
}

int truncate(const char *name, off_t size) {
    lock();
    return truncated(name, REAL(truncate)(name, size));
}

int truncate64(const char *name, off64_t size) {
    lock();
    return truncated(name, REAL(truncate64)(name, size));
}

/* Stores through it are invisible. SQLite maps its -shm file, which it makes anew after a crash. */
static void *mapped(void *memory, int protection, int flags, int descriptor) {
    char path[PATH_MAX];
    struct stat status;
    int kept = errno;
    bool shared = (flags & MAP_TYPE) == MAP_SHARED || (flags & MAP_TYPE) == MAP_SHARED_VALIDATE;
    if (memory != MAP_FAILED && descriptor >= 0 && shared && (protection & PROT_WRITE) && watched(descriptor, path, &status)) {
        lock();
        record(UNSEEN, status.st_ino, 0, path, "", NULL, 0);
        unlock();
    }
    errno = kept;
    return memory;
}

void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t at) {
    return mapped(REAL(mmap)(address, size, protection, flags, fd, at), protection, flags, fd);
}

void *mmap64(void *address, size_t size, int protection, int flags, int fd, off64_t at) {
    return mapped(REAL(mmap64)(address, size, protection, flags, fd, at), protection, flags, fd);
}

/* --- names ---------------------------------------------------------------------------------------------------------- */

static int opened(int directory, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    struct stat status;
    int kept = errno;
    bool watching = (flags & (O_CREAT | O_TRUNC)) && (flags & O_TMPFILE) != O_TMPFILE && resolve(directory, name, path);
    errno = kept;
    if (!watching) return REAL(openat)(directory, name, flags, mode);
    lock();
    bool existed = lstat(path, &status) == 0;
    errno = kept;
    int descriptor = REAL(openat)(directory, name, flags, mode);
    kept = errno;
    if (descriptor >= 0 && fstat(descriptor, &status) == 0) {
        if (!existed) record(CREATE, status.st_ino, 0, path, "", NULL, 0);
        else if (flags & O_TRUNC) record(RESIZE, status.st_ino, 0, path, "", NULL, 0);
    }
    unlock();
    errno = kept;
    return descriptor;
}

static mode_t mode_of(int flags, va_list arguments) {
    return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(arguments, mode_t) : 0;
}

#define OPENER(name, directory, ...)              \
    int name(__VA_ARGS__, int flags, ...) {       \
        va_list arguments;                        \
        va_start(arguments, flags);               \
        mode_t mode = mode_of(flags, arguments);  \
        va_end(arguments);                        \
        return opened(directory, path, flags, mode); \
    }

OPENER(open, AT_FDCWD, const char *path)
OPENER(open64, AT_FDCWD, const char *path)
OPENER(openat, fd, int fd, const char *path)
OPENER(openat64, fd, int fd, const char *path)

int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* A change of one name, or of two. */
struct names {
    char path[PATH_MAX], other[PATH_MAX];
};

/* Resolve the names, since the call may take them away, and take the lock; false: nobody watches them. */
static bool begin(struct names *names, int at, const char *path, int other_at, const char *other) {
    int kept = errno;
    names->other[0] = 0;
    bool watching = resolve(at, path, names->path) && (other == NULL || resolve(other_at, other, names->other));
    errno = kept;
    if (watching) lock();
    return watching;
}

static int end(const struct names *names, int result, enum kind kind) {
    struct stat status;
    int kept = errno;
    if (result == 0) {
        uint64_t inode = kind == MKDIR && stat(names->path, &status) == 0 ? status.st_ino : 0;
        record(kind, inode, 0, names->path, names->other, NULL, 0);
    }
    errno = kept;
    unlock();
    return result;
}

#define NAMER(declaration, at, path, other_at, other, call, kind)      \
    declaration {                                                      \
        struct names names;                                            \
        if (!begin(&names, at, path, other_at, other)) return call;    \
        return end(&names, call, kind);                                \
    }

NAMER(int unlink(const char *a), AT_FDCWD, a, 0, NULL, REAL(unlink)(a), UNLINK)
NAMER(int rmdir(const char *a), AT_FDCWD, a, 0, NULL, REAL(rmdir)(a), RMDIR)
NAMER(int unlinkat(int d, const char *a, int flags), d, a, 0, NULL, REAL(unlinkat)(d, a, flags),
      (flags & AT_REMOVEDIR ? RMDIR : UNLINK))
NAMER(int mkdir(const char *a, mode_t mode), AT_FDCWD, a, 0, NULL, REAL(mkdir)(a, mode), MKDIR)
NAMER(int mkdirat(int d, const char *a, mode_t mode), d, a, 0, NULL, REAL(mkdirat)(d, a, mode), MKDIR)
NAMER(int rename(const char *a, const char *b), AT_FDCWD, a, AT_FDCWD, b, REAL(rename)(a, b), RENAME)
NAMER(int renameat(int d, const char *a, int e, const char *b), d, a, e, b, REAL(renameat)(d, a, e, b), RENAME)
NAMER(int link(const char *a, const char *b), AT_FDCWD, a, AT_FDCWD, b, REAL(link)(a, b), LINK)
NAMER(int linkat(int d, const char *a, int e, const char *b, int flags), d, a, e, b, REAL(linkat)(d, a, e, b, flags), LINK)
