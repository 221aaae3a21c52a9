/* Preloaded into a process: counts the calls that change files, and kills it or fails at the one that is armed.

   arm(n, 0): SIGKILL before the n-th call.  arm(n, 1): the same, but a write does half of its work first.
   arm(n, errno): from the n-th call on all that takes room fails so.  counted(): calls since the last arm. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static long count, at;
static int mode;

void arm(long n, int how) { count = 0; at = n; mode = how; }
long counted(void) { return count; }

enum { FREE, ROOM, WRITE };

/* Returns -1 when the call is to fail, 1 when half of it is to be done before the end. */
static int moment(int takes) {
    long now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (at == 0 || now < at) return 0;
    if (mode > 1) {
        return takes == FREE ? 0 : -1;
    }
    if (now > at) return 0;
    if (mode == 1 && takes == WRITE) return 1;
    kill(getpid(), SIGKILL);
    return 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define PLAIN(room, call) { if (moment(room) < 0) { errno = mode; return -1; } return call; }
#define WRITING(call, half) { int now = moment(WRITE); if (now < 0) { errno = mode; return -1; } \
    if (now == 1) { half; kill(getpid(), SIGKILL); } return call; }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (fd <= 2) return real(fd, data, size);
    WRITING(real(fd, data, size), real(fd, data, size / 2))
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64); WRITING(real(fd, data, size, offset), real(fd, data, size / 2, offset))
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    REAL(pwrite); WRITING(real(fd, data, size, offset), real(fd, data, size / 2, offset))
}
int fsync(int fd) { REAL(fsync); PLAIN(FREE, real(fd)) }
int rename(const char *from, const char *to) { REAL(rename); PLAIN(FREE, real(from, to)) }
int unlink(const char *path) { REAL(unlink); PLAIN(FREE, real(path)) }
int unlinkat(int dir, const char *path, int flags) { REAL(unlinkat); PLAIN(FREE, real(dir, path, flags)) }
int rmdir(const char *path) { REAL(rmdir); PLAIN(FREE, real(path)) }
int mkdir(const char *path, mode_t bits) { REAL(mkdir); PLAIN(ROOM, real(path, bits)) }
int fallocate(int fd, int how, off_t offset, off_t size) { REAL(fallocate); PLAIN(ROOM, real(fd, how, offset, size)) }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); PLAIN(FREE, real(fd, size)) }

static int opening(int (*real)(const char *, int, ...), const char *path, int flags, mode_t bits) {
    if ((flags & O_CREAT) && moment(ROOM) < 0) { errno = mode; return -1; }
    return real(path, flags, bits);
}
#define BITS mode_t bits = 0; if (flags & O_CREAT) { va_list list; va_start(list, flags); bits = va_arg(list, mode_t); va_end(list); }
int open64(const char *path, int flags, ...) { REAL(open64); BITS return opening(real, path, flags, bits); }
int open(const char *path, int flags, ...) { REAL(open); BITS return opening(real, path, flags, bits); }
