/* Let the n-th call of this process that changes something under a folder fail: LD_PRELOAD, see faults.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static long left = -1; /* calls until the one that fails; below 0: none will */
static int error_number;
static char failed[32]; /* the call that failed; empty: none has */
static char last[PATH_MAX + 32]; /* the call before, and its file */
static int repeated; /* how often it was made in a row */

void fault_arm(const char *folder, long at, int number) {
    strncpy(prefix, folder, sizeof prefix - 1);
    left = at, error_number = number, failed[0] = last[0] = 0;
}

const char *fault_failed(void) {
    left = -1;
    return failed;
}

/* Of one call made again and again on one file, such as the writes of its tensors, the first may fail (nothing is in
   the file) and the second (some of it is): the others leave nothing else behind. */
static int fails(const char *call, const char *path) {
    char now[sizeof last];
    if (left < 0 || strncmp(path, prefix, strlen(prefix)) != 0) return 0;
    if (strstr(path, "/heartbeats")) return 0; /* of the watchdog's thread, now and then */
    snprintf(now, sizeof now, "%s %s", call, path);
    repeated = strcmp(now, last) == 0 ? repeated + 1 : 0;
    strcpy(last, now);
    if (repeated > 1 || left-- > 0) return 0;
    strncpy(failed, call, sizeof failed - 1);
    errno = error_number;
    return 1;
}

static int fails_fd(const char *call, int fd) {
    char link[64], path[PATH_MAX];
    if (left < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(call, path);
}

#define NEXT(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define OF_FD(type, name, declared, given, ...) \
    type name declared { return fails_fd(#name, fd) ? -1 : NEXT(type, name, __VA_ARGS__) given; }
#define OF_PATH(name, declared, given, ...) \
    int name declared { return fails(#name, path) ? -1 : NEXT(int, name, __VA_ARGS__) given; }

OF_FD(ssize_t, write, (int fd, const void *data, size_t count), (fd, data, count), int, const void *, size_t)
OF_FD(ssize_t, writev, (int fd, const struct iovec *data, int count), (fd, data, count), int, const struct iovec *, int)
OF_FD(int, fsync, (int fd), (fd), int)
OF_FD(int, fdatasync, (int fd), (fd), int)
OF_FD(int, ftruncate, (int fd, off_t length), (fd, length), int, off_t)
OF_FD(int, ftruncate64, (int fd, off64_t length), (fd, length), int, off64_t)
OF_FD(int, fchmod, (int fd, mode_t mode), (fd, mode), int, mode_t)
OF_PATH(mkdir, (const char *path, mode_t mode), (path, mode), const char *, mode_t)
OF_PATH(rmdir, (const char *path), (path), const char *)
OF_PATH(unlink, (const char *path), (path), const char *)
OF_PATH(chmod, (const char *path, mode_t mode), (path, mode), const char *, mode_t)
OF_PATH(rename, (const char *path, const char *to), (path, to), const char *, const char *)

#define OPEN(name, declared, given, ...) \
    int name declared { \
        va_list arguments; \
        va_start(arguments, flags); \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(arguments, mode_t) : 0; \
        va_end(arguments); \
        if (flags & (O_CREAT | O_WRONLY | O_RDWR) && fails(#name, path)) return -1; \
        return NEXT(int, name, __VA_ARGS__) given; \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode), const char *, int, ...)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), const char *, int, ...)
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), int, const char *, int, ...)
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), int, const char *, int, ...)
