/* A library for LD_PRELOAD that makes the disk fail at the n-th call that changes a file below a folder.
 *
 * fail_from(root, n, error, times) arms it; changes() returns the number of such calls. It counts opens for writing,
 * writes, truncations, syncs, renames, links and new folders. Deleting always works, as on a full disk.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long first = -1, last = -1, count = 0;
static int failure = 0;

void fail_from(const char *folder, long n, int error, long times) {
    snprintf(root, sizeof root, "%s/", folder);
    count = 0;
    first = n;
    last = n + times;
    failure = error;
}

long changes(void) { return count; }

static int fails(void) {
    long now = __sync_fetch_and_add(&count, 1);
    if (first < 0 || now < first || now >= last) return 0;
    errno = failure;
    return 1;
}

static int below(const char *path) {
    char full[PATH_MAX], folder[PATH_MAX];
    if (!*root || !path) return 0;
    if (*path == '/') snprintf(full, sizeof full, "%s/", path);
    else {
        if (!getcwd(folder, sizeof folder)) return 0;
        snprintf(full, sizeof full, "%.2000s/%.2000s/", folder, path);
    }
    return strncmp(full, root, strlen(root)) == 0;
}

static int below_fd(int fd) {
    char name[64], path[PATH_MAX];
    ssize_t size;
    if (!*root) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    size = readlink(name, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define MODE va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list)

int open(const char *path, int flags, ...) { MODE; REAL(open); return writes(flags) && below(path) && fails() ? -1 : real(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE; REAL(open64); return writes(flags) && below(path) && fails() ? -1 : real(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE; REAL(openat); return writes(flags) && below(path) && fails() ? -1 : real(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE; REAL(openat64); return writes(flags) && below(path) && fails() ? -1 : real(at, path, flags, mode); }
ssize_t write(int fd, const void *data, size_t size) { REAL(write); return below_fd(fd) && fails() ? -1 : real(fd, data, size); }
ssize_t writev(int fd, const struct iovec *data, int n) { REAL(writev); return below_fd(fd) && fails() ? -1 : real(fd, data, n); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { REAL(pwrite); return below_fd(fd) && fails() ? -1 : real(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(pwrite64); return below_fd(fd) && fails() ? -1 : real(fd, data, size, at); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); return below_fd(fd) && fails() ? -1 : real(fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); return below_fd(fd) && fails() ? -1 : real(fd, size); }
int fsync(int fd) { REAL(fsync); return below_fd(fd) && fails() ? -1 : real(fd); }
int fdatasync(int fd) { REAL(fdatasync); return below_fd(fd) && fails() ? -1 : real(fd); }
int rename(const char *from, const char *to) { REAL(rename); return below(to) && fails() ? -1 : real(from, to); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); return below(to) && fails() ? -1 : real(a, from, b, to); }
int symlink(const char *target, const char *path) { REAL(symlink); return below(path) && fails() ? -1 : real(target, path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return below(path) && fails() ? -1 : real(path, mode); }
