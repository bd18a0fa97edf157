/* Fails one file operation below a folder: preloaded, it stands before the C library's functions of the same names.

An operation that changes something on the disk is counted. The one with the number that was asked for returns an error,
or ends the process in the middle of it. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char place[PATH_MAX];
static long turn, fail_at;
static int with;
static char failed[64];

/* Counts from here on below a folder; the operation fail_at fails with an errno, or the process is killed with -1. */
void faults_arm(const char *folder, long number, int error) {
    strncpy(place, folder, sizeof place - 1);
    turn = 0, fail_at = number, with = error, failed[0] = 0;
}

long faults_count(void) { return turn; }

const char *faults_failed(void) { return failed; }

static int is_inside(int folder, const char *path) {
    char whole[2 * PATH_MAX], link[64];
    if (!place[0]) return 0;
    if (path && path[0] == '/') return !strncmp(path, place, strlen(place));
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, whole, sizeof whole) < 0) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        long size = syscall(SYS_readlinkat, AT_FDCWD, link, whole, sizeof whole - 1);
        if (size < 0) return 0;
        whole[size] = 0;
    }
    return !strncmp(whole, place, strlen(place));
}

/* Whether this operation is the one that fails. */
static int fails(int folder, const char *path, const char *name) {
    int before = errno;
    if (!is_inside(folder, path) || ++turn != fail_at) {
        errno = before;
        return 0;
    }
    strncpy(failed, name, sizeof failed - 1);
    if (with < 0) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    errno = with;
    return 1;
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
    if (flags & (O_WRONLY | O_RDWR | O_CREAT) && fails(folder, path, "open")) return -1;
    return syscall(SYS_openat, folder, path, flags, mode);
}

#define OPEN(name, before, folder)                                                                                     \
    int name(before const char *path, int flags, ...) {                                                                \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0;                                           \
        va_end(more);                                                                                                  \
        return opened(folder, path, flags, mode);                                                                      \
    }
#define NOTHING
#define FOLDER int folder,
OPEN(open, NOTHING, AT_FDCWD)
OPEN(open64, NOTHING, AT_FDCWD)
OPEN(openat, FOLDER, folder)
OPEN(openat64, FOLDER, folder)

ssize_t write(int file, const void *data, size_t size) {
    if (fails(file, NULL, "write")) return -1;
    return syscall(SYS_write, file, data, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    if (fails(file, NULL, "write")) return -1;
    return syscall(SYS_writev, file, parts, count);
}

int fsync(int file) {
    if (fails(file, NULL, "fsync")) return -1;
    return syscall(SYS_fsync, file);
}

int fdatasync(int file) {
    if (fails(file, NULL, "fsync")) return -1;
    return syscall(SYS_fdatasync, file);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    if (fails(to, new, flags ? "swap" : "rename")) return -1;
    return syscall(SYS_renameat2, from, old, to, new, flags);
}

int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }

int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int mkdirat(int folder, const char *path, mode_t mode) {
    if (fails(folder, path, "mkdir")) return -1;
    return syscall(SYS_mkdirat, folder, path, mode);
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int folder, const char *path, int flags) {
    if (fails(folder, path, flags & AT_REMOVEDIR ? "rmdir" : "unlink")) return -1;
    return syscall(SYS_unlinkat, folder, path, flags);
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    if (fails(folder, path, "chmod")) return -1;
    return syscall(SYS_fchmodat, folder, path, mode);
}

int chmod(const char *path, mode_t mode) { return fchmodat(AT_FDCWD, path, mode, 0); }
