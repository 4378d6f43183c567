/* Faults in the calls that change a file or a folder, for LD_PRELOAD. Linux.

   Armed by faults_arm(), it counts the calls that change something under one folder, and at one of them kills the
   process, before it or half way through it, or lets it fail, or writes all of them to a journal. The real calls are
   made as system calls, so that nothing is looked up while a library is loading. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { OFF, COUNT, KILL_BEFORE, KILL_HALF, FULL, BROKEN, JOURNAL };
enum verdict { GO, HALF, FAIL };

static char folder[PATH_MAX];
static size_t folder_length;
static enum mode mode = OFF;
static long at, calls;
static int journal = -1;
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

int faults_arm(const char *watched, int how, long call, int journal_descriptor) {
    if (strlen(watched) >= sizeof folder) return -1;
    strcpy(folder, watched);
    folder_length = strlen(folder);
    at = call, calls = 0, journal = journal_descriptor;
    mode = how;
    return 0;
}

void faults_disarm(void) { mode = OFF; }

long faults_count(void) { return calls; }

static int is_watched(const char *path) {
    return strncmp(path, folder, folder_length) == 0 && (path[folder_length] == '/' || path[folder_length] == 0);
}

static int path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length >= 0;
}

/* The absolute form of a path, links and dots left as they are; whether it is watched. */
static int locate(int directory, const char *given, char *path) {
    if (mode == OFF) return 0;
    int error = errno;
    if (given[0] == '/') {
        snprintf(path, PATH_MAX, "%s", given);
    } else {
        char above[PATH_MAX];
        if (directory == AT_FDCWD ? syscall(SYS_getcwd, above, sizeof above) < 0 : !path_of(directory, above)) above[0] = 0;
        size_t length = strlen(above);
        snprintf(path, PATH_MAX, "%s", above);
        snprintf(path + length, PATH_MAX - length, "/%s", given);
    }
    errno = error;
    return is_watched(path);
}

static int is_open_under(int descriptor, char *path) {
    if (mode == OFF) return 0;
    int error = errno, found = path_of(descriptor, path) && is_watched(path);
    errno = error;
    return found;
}

static void die(void) { syscall(SYS_kill, getpid(), SIGKILL); pause(); }

/* What becomes of the next call. The lock is held until done(), so that the journal has the order of the calls. */
static enum verdict next(int takes_space) {
    pthread_mutex_lock(&one_at_a_time);
    long call = ++calls;
    switch (mode) {
        case KILL_BEFORE: if (call == at) die(); return GO;
        case KILL_HALF: return call == at ? HALF : GO;
        case FULL: return call < at || !takes_space ? GO : call == at ? HALF : FAIL;
        case BROKEN: return call == at ? FAIL : GO;
        default: return GO;
    }
}

static long done(long result, int error) {
    pthread_mutex_unlock(&one_at_a_time);
    errno = error;
    return result;
}

static int reason(void) { return mode == FULL ? ENOSPC : EIO; }

struct entry { uint64_t kind, inode, offset, first, second, bytes; };

static void note(char kind, uint64_t inode, uint64_t offset, const char *first, const char *second, const void *data, size_t bytes) {
    if (mode != JOURNAL) return;
    struct entry entry = {(uint64_t)kind, inode, offset, strlen(first), strlen(second), bytes};
    struct iovec pieces[] = {{&entry, sizeof entry}, {(void *)first, entry.first}, {(void *)second, entry.second}, {(void *)data, bytes}};
    size_t whole = sizeof entry + entry.first + entry.second + bytes;
    if (syscall(SYS_writev, journal, pieces, 4) != (long)whole) abort();
}

void faults_mark(const char *text) {
    if (mode != JOURNAL) return;
    pthread_mutex_lock(&one_at_a_time);
    note('A', 0, 0, text, "", NULL, 0);
    done(0, errno);
}

static uint64_t inode_of(int descriptor) {
    struct stat found;
    return syscall(SYS_fstat, descriptor, &found) == 0 ? found.st_ino : 0;
}

/* One call that is whole or not at all. Half way through it is behind it; a full disk refuses it. */
#define ONE(takes_space, call, ...)                                                     \
    do {                                                                                \
        enum verdict verdict = next(takes_space);                                       \
        if (verdict == FAIL || (verdict == HALF && mode == FULL)) return done(-1, reason()); \
        long result = (call);                                                           \
        int error = errno;                                                              \
        if (verdict == HALF) die();                                                     \
        if (result >= 0) note(__VA_ARGS__);                                             \
        return done(result, error);                                                     \
    } while (0)

static int opened(int directory, const char *given, int flags, mode_t permissions) {
    char path[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC)) || !locate(directory, given, path))
        return syscall(SYS_openat, directory, given, flags, permissions);
    int is_new = syscall(SYS_faccessat, directory, given, F_OK) != 0;
    if (!is_new && !(flags & O_TRUNC)) return syscall(SYS_openat, directory, given, flags, permissions);
    ONE(1, syscall(SYS_openat, directory, given, flags, permissions), is_new ? 'C' : 'T', inode_of(result), 0, path, "", NULL, 0);
}

#define PERMISSIONS                              \
    mode_t permissions = 0;                      \
    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) { \
        va_list more;                            \
        va_start(more, flags);                   \
        permissions = va_arg(more, mode_t);      \
        va_end(more);                            \
    }

int open(const char *path, int flags, ...) { PERMISSIONS return opened(AT_FDCWD, path, flags, permissions); }
int open64(const char *path, int flags, ...) { PERMISSIONS return opened(AT_FDCWD, path, flags, permissions); }
int openat(int directory, const char *path, int flags, ...) { PERMISSIONS return opened(directory, path, flags, permissions); }
int openat64(int directory, const char *path, int flags, ...) { PERMISSIONS return opened(directory, path, flags, permissions); }

/* At an offset, or with -1 where the file stands. */
static ssize_t written(int descriptor, const void *data, size_t bytes, off_t offset) {
    char path[PATH_MAX];
    if (!is_open_under(descriptor, path))
        return offset < 0 ? syscall(SYS_write, descriptor, data, bytes) : syscall(SYS_pwrite64, descriptor, data, bytes, offset);
    enum verdict verdict = next(1);
    size_t given = verdict == HALF ? bytes / 2 : bytes;
    if (verdict == FAIL || (verdict == HALF && mode == FULL && given == 0)) return done(-1, reason());
    ssize_t result = offset < 0 ? syscall(SYS_write, descriptor, data, given) : syscall(SYS_pwrite64, descriptor, data, given, offset);
    int error = errno;
    if (verdict == HALF && mode == KILL_HALF) die();
    if (result > 0) {
        off_t start = offset < 0 ? syscall(SYS_lseek, descriptor, 0, SEEK_CUR) - result : offset;
        note('W', inode_of(descriptor), start, path, "", data, result);
    }
    return done(result, error);
}

static ssize_t written_pieces(int descriptor, const struct iovec *pieces, int count, off_t offset) {
    char path[PATH_MAX];
    if (!is_open_under(descriptor, path))
        return offset < 0 ? syscall(SYS_writev, descriptor, pieces, count)
                          : syscall(SYS_pwritev, descriptor, pieces, count, offset, 0);
    size_t bytes = 0, used = 0;
    for (int i = 0; i < count; i++) bytes += pieces[i].iov_len;
    char *whole = malloc(bytes + 1);
    if (!whole) abort();
    for (int i = 0; i < count; used += pieces[i++].iov_len) memcpy(whole + used, pieces[i].iov_base, pieces[i].iov_len);
    ssize_t result = written(descriptor, whole, bytes, offset);
    free(whole);
    return result;
}

ssize_t write(int descriptor, const void *data, size_t bytes) { return written(descriptor, data, bytes, -1); }
ssize_t pwrite(int descriptor, const void *data, size_t bytes, off_t offset) { return written(descriptor, data, bytes, offset); }
ssize_t pwrite64(int descriptor, const void *data, size_t bytes, off_t offset) { return written(descriptor, data, bytes, offset); }
ssize_t writev(int descriptor, const struct iovec *pieces, int count) { return written_pieces(descriptor, pieces, count, -1); }
ssize_t pwritev(int descriptor, const struct iovec *pieces, int count, off_t offset) { return written_pieces(descriptor, pieces, count, offset); }
ssize_t pwritev64(int descriptor, const struct iovec *pieces, int count, off_t offset) { return written_pieces(descriptor, pieces, count, offset); }

int ftruncate(int descriptor, off_t bytes) {
    char path[PATH_MAX];
    if (!is_open_under(descriptor, path)) return syscall(SYS_ftruncate, descriptor, bytes);
    ONE(1, syscall(SYS_ftruncate, descriptor, bytes), 'T', inode_of(descriptor), bytes, path, "", NULL, 0);
}
int ftruncate64(int descriptor, off_t bytes) { return ftruncate(descriptor, bytes); }

int truncate(const char *given, off_t bytes) {
    char path[PATH_MAX];
    struct stat found;
    if (!locate(AT_FDCWD, given, path) || stat(path, &found)) return syscall(SYS_truncate, given, bytes);
    ONE(1, syscall(SYS_truncate, given, bytes), 'T', found.st_ino, bytes, path, "", NULL, 0);
}
int truncate64(const char *path, off_t bytes) { return truncate(path, bytes); }

static int synced(int descriptor, long number) {
    char path[PATH_MAX];
    struct stat found;
    if (!is_open_under(descriptor, path) || fstat(descriptor, &found)) return syscall(number, descriptor);
    ONE(1, syscall(number, descriptor), S_ISDIR(found.st_mode) ? 'D' : 'S', found.st_ino, 0, path, "", NULL, 0);
}
int fsync(int descriptor) { return synced(descriptor, SYS_fsync); }
int fdatasync(int descriptor) { return synced(descriptor, SYS_fdatasync); }

int renameat2(int from_directory, const char *from, int to_directory, const char *to, unsigned flags) {
    char source[PATH_MAX], target[PATH_MAX];
    int watched = locate(from_directory, from, source);
    if (!(locate(to_directory, to, target) | watched)) return syscall(SYS_renameat2, from_directory, from, to_directory, to, flags);
    ONE(1, syscall(SYS_renameat2, from_directory, from, to_directory, to, flags), 'R', flags, 0, source, target, NULL, 0);
}
int renameat(int from_directory, const char *from, int to_directory, const char *to) { return renameat2(from_directory, from, to_directory, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int linkat(int from_directory, const char *from, int to_directory, const char *to, int flags) {
    char source[PATH_MAX], target[PATH_MAX];
    int watched = locate(from_directory, from, source);
    if (!(locate(to_directory, to, target) | watched)) return syscall(SYS_linkat, from_directory, from, to_directory, to, flags);
    ONE(1, syscall(SYS_linkat, from_directory, from, to_directory, to, flags), 'L', 0, 0, source, target, NULL, 0);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int directory, const char *given, int flags) {
    char path[PATH_MAX];
    if (!locate(directory, given, path)) return syscall(SYS_unlinkat, directory, given, flags);
    ONE(0, syscall(SYS_unlinkat, directory, given, flags), flags & AT_REMOVEDIR ? 'X' : 'U', 0, 0, path, "", NULL, 0);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int directory, const char *given, mode_t permissions) {
    char path[PATH_MAX];
    if (!locate(directory, given, path)) return syscall(SYS_mkdirat, directory, given, permissions);
    ONE(1, syscall(SYS_mkdirat, directory, given, permissions), 'M', 0, 0, path, "", NULL, 0);
}
int mkdir(const char *path, mode_t permissions) { return mkdirat(AT_FDCWD, path, permissions); }
