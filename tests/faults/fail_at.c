/* Preloaded into a process: counts the calls that change files, and kills it or fails at the one that is armed.

   Before a call is one moment and after it is the next:
   arm(n, 0): SIGKILL at the n-th moment.  arm(n, -1): the same of the whole process group.
   Otherwise a call is one moment:
   arm(n, 1): SIGKILL at the n-th call, of which a write does half of its work first.
   arm(n, errno): from the n-th call on all that takes room fails so.
   counted(): moments since the last arm. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long count, at;
static int mode;

void arm(long n, int how) { count = 0; at = n; mode = how; }
long counted(void) { return count; }

static long tick(void) { return __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST); }
static void killed(void) { kill(mode == -1 ? 0 : getpid(), SIGKILL); }
static void after(void) { if (mode < 1 && tick() == at) killed(); }

enum { FREE, ROOM, WRITE };

/* Returns -1 when the call is to fail, 1 when half of it is to be done before the end. */
static int before(int takes) {
    long now = tick();
    if (at == 0 || now < at) return 0;
    if (mode > 1) return takes == FREE ? 0 : -1;
    if (now > at) return 0;
    if (mode == 1 && takes == WRITE) return 1;
    killed();
    return 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define DONE(call) { __typeof__(call) done = call; int why = errno; after(); errno = why; return done; }
#define PLAIN(room, call) { if (before(room) < 0) { errno = mode; return -1; } DONE(call) }
#define WRITING(call, half) { int now = before(WRITE); if (now < 0) { errno = mode; return -1; } \
    if (now == 1) { half; killed(); } DONE(call) }

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
ssize_t writev(int fd, const struct iovec *parts, int num) {
    REAL(writev); WRITING(real(fd, parts, num), real(fd, parts, num / 2))
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
    REAL(sendfile64); WRITING(real(to, from, offset, size), real(to, from, offset, size / 2))
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
    if (!(flags & O_CREAT)) return real(path, flags, bits);
    PLAIN(ROOM, real(path, flags, bits))
}
#define BITS mode_t bits = 0; if (flags & O_CREAT) { va_list list; va_start(list, flags); bits = va_arg(list, mode_t); va_end(list); }
int open64(const char *path, int flags, ...) { REAL(open64); BITS return opening(real, path, flags, bits); }
int open(const char *path, int flags, ...) { REAL(open); BITS return opening(real, path, flags, bits); }
