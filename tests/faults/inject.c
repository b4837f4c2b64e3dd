/* A fault at the N-th call that changes files under a directory, below Python, torch and every other writer.
 *
 * Loaded with LD_PRELOAD; it does nothing until faults_arm is called, by ctypes. What glibc calls inside itself is not
 * seen (stdio's own buffers, mmap); tests/faults/injector.py says how that was checked.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { LOG, BEFORE, AFTER, TORN, ERROR, SHORT };  /* as in injector.py */

static char root[PATH_MAX];
static size_t root_length;  /* 0: not armed */
static long fault_at;       /* counted from 1; 0: at every call */
static int fault, value, log_file;
static atomic_long count;

void faults_arm(const char *directory, long at, int kind, int number, int log) {
    fault_at = at, fault = kind, value = number, log_file = log;
    atomic_store(&count, 0);
    snprintf(root, sizeof root, "%s", directory);
    root_length = strlen(root);
}

long faults_count(void) { return atomic_load(&count); }

static int is_under(int directory, const char *path, char *full) {
    char place[64];
    ssize_t length = 0;
    full[0] = 0;
    if (!path || path[0] != '/') {
        if (directory == AT_FDCWD && path) strcpy(place, "/proc/self/cwd");
        else snprintf(place, sizeof place, "/proc/self/fd/%d", directory);
        length = readlink(place, full, PATH_MAX - 1);
        if (length < 0) return 0;
        if (path) full[length++] = '/';
    }
    snprintf(full + length, PATH_MAX - length, "%s", path ? path : "");
    return !strncmp(full, root, root_length) && (full[root_length] == '/' || !full[root_length]);
}

/* Whether this call is the one, and what to do; logs it. */
static int due(const char *call, int directory, const char *path) {
    int before = errno, found = LOG;
    char full[PATH_MAX], line[PATH_MAX + 64];
    if (root_length && is_under(directory, path, full)) {
        long number = atomic_fetch_add(&count, 1) + 1;
        if (log_file >= 0) {
            int length = snprintf(line, sizeof line, "%s %s\n", call, full + root_length);
            syscall(SYS_write, log_file, line, length);
        }
        if (fault_at == 0 || number == fault_at) found = fault;
        if (found == BEFORE) kill(getpid(), value);
    }
    errno = before;
    return found;
}

static size_t part(int file, size_t size) {
    size_t half = size / 2;
    return fcntl(file, F_GETFL) & O_DIRECT ? half & ~(size_t)4095 : half;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define END(result) do { if (todo == AFTER || todo == TORN) kill(getpid(), value); return result; } while (0)
#define REFUSE(failure) do { if (todo == ERROR) { errno = value; return failure; } } while (0)

/* Calls that either happen or do not. */
#define WHOLE(type, failure, name, parameters, arguments, directory, path) \
    type name parameters { \
        REAL(name); int todo = due(#name, directory, path); REFUSE(failure); \
        type result = real arguments; END(result); \
    }
WHOLE(int, -1, fsync, (int file), (file), file, 0)
WHOLE(int, -1, fdatasync, (int file), (file), file, 0)
WHOLE(int, -1, ftruncate, (int file, off_t size), (file, size), file, 0)
WHOLE(int, -1, ftruncate64, (int file, off64_t size), (file, size), file, 0)
WHOLE(int, -1, fallocate, (int file, int mode, off_t at, off_t size), (file, mode, at, size), file, 0)
WHOLE(int, -1, fallocate64, (int file, int mode, off64_t at, off64_t size), (file, mode, at, size), file, 0)
WHOLE(int, -1, rename, (const char *from, const char *to), (from, to), AT_FDCWD, to)
WHOLE(int, -1, renameat, (int d, const char *from, int e, const char *to), (d, from, e, to), e, to)
WHOLE(int, -1, renameat2, (int d, const char *from, int e, const char *to, unsigned flags), (d, from, e, to, flags), e, to)
WHOLE(int, -1, unlink, (const char *path), (path), AT_FDCWD, path)
WHOLE(int, -1, unlinkat, (int d, const char *path, int flags), (d, path, flags), d, path)
WHOLE(int, -1, rmdir, (const char *path), (path), AT_FDCWD, path)
WHOLE(int, -1, mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
WHOLE(int, -1, mkdirat, (int d, const char *path, mode_t mode), (d, path, mode), d, path)
WHOLE(int, -1, link, (const char *from, const char *to), (from, to), AT_FDCWD, to)
WHOLE(int, -1, linkat, (int d, const char *from, int e, const char *to, int flags), (d, from, e, to, flags), e, to)
WHOLE(int, -1, symlink, (const char *from, const char *to), (from, to), AT_FDCWD, to)

/* Calls that may do a part. */
#define PARTIAL(name, parameters, file, size, arguments, shorter) \
    ssize_t name parameters { \
        REAL(name); int todo = due(#name, file, 0); REFUSE(-1); \
        size_t less = todo == TORN || todo == SHORT ? part(file, size) : 0; \
        ssize_t result = less ? real shorter : todo == TORN ? 0 : real arguments; END(result); \
    }
PARTIAL(write, (int f, const void *octets, size_t n), f, n, (f, octets, n), (f, octets, less))
PARTIAL(pwrite, (int f, const void *octets, size_t n, off_t at), f, n, (f, octets, n, at), (f, octets, less, at))
PARTIAL(pwrite64, (int f, const void *octets, size_t n, off64_t at), f, n, (f, octets, n, at), (f, octets, less, at))
PARTIAL(sendfile, (int f, int in, off_t *at, size_t n), f, n, (f, in, at, n), (f, in, at, less))
PARTIAL(sendfile64, (int f, int in, off64_t *at, size_t n), f, n, (f, in, at, n), (f, in, at, less))
PARTIAL(copy_file_range, (int in, off64_t *from, int f, off64_t *to, size_t n, unsigned flags), f, n,
        (in, from, f, to, n, flags), (in, from, f, to, less, flags))
/* Of several buffers a part is the first one. */
PARTIAL(writev, (int f, const struct iovec *parts, int n), f, n > 1 ? 2 : 0, (f, parts, n), (f, parts, 1))
PARTIAL(pwritev, (int f, const struct iovec *parts, int n, off_t at), f, n > 1 ? 2 : 0, (f, parts, n, at), (f, parts, 1, at))
PARTIAL(pwritev64, (int f, const struct iovec *parts, int n, off64_t at), f, n > 1 ? 2 : 0, (f, parts, n, at), (f, parts, 1, at))

/* Opening to write; other opening is none of our business. */
#define OPENING(name, parameters, directory, plain, with_mode) \
    int name parameters { \
        REAL(name); mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
        if ((flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT)) return real plain; \
        int todo = due(#name, directory, path); REFUSE(-1); \
        int result = real with_mode; END(result); \
    }
OPENING(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode), (path, flags, mode))
OPENING(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode), (path, flags, mode))
OPENING(openat, (int d, const char *path, int flags, ...), d, (d, path, flags, mode), (d, path, flags, mode))
OPENING(openat64, (int d, const char *path, int flags, ...), d, (d, path, flags, mode), (d, path, flags, mode))

#define FOPENING(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); if (!strpbrk(mode, "wa+")) return real(path, mode); \
        int todo = due(#name, AT_FDCWD, path); REFUSE(NULL); \
        FILE *result = real(path, mode); END(result); \
    }
FOPENING(fopen)
FOPENING(fopen64)

/* A file that was open to write is closed in any case, as Linux does when close fails. */
int close(int file) {
    REAL(close);
    int flags = root_length ? fcntl(file, F_GETFL) : -1;
    int todo = flags >= 0 && (flags & O_ACCMODE) != O_RDONLY ? due("close", file, 0) : LOG;
    int result = real(file);
    REFUSE(-1);
    END(result);
}
