/* A wall clock that a test moves: what CLOCK_REALTIME says is shifted by the nanoseconds in the first 8 bytes of the file
   that MOVED_CLOCK names; CLOCK_MONOTONIC stays. For LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile long long *moved;
static int (*real_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void start(void)
{
    real_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("MOVED_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *page = mmap(NULL, sizeof(long long), PROT_READ, MAP_SHARED, file, 0);
    moved = page == MAP_FAILED ? NULL : page;
    close(file);
}

static int now(clockid_t clock, struct timespec *out)
{
    if (!real_gettime)
        start();
    int result = real_gettime(clock, out);
    if (result == 0 && moved && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        long long at = out->tv_sec * 1000000000LL + out->tv_nsec + *moved;
        out->tv_sec = at / 1000000000LL;
        out->tv_nsec = at % 1000000000LL;
    }
    return result;
}

int clock_gettime(clockid_t clock, struct timespec *out) { return now(clock, out); }

int gettimeofday(struct timeval *out, void *zone)
{
    struct timespec at;
    (void)zone;
    if (now(CLOCK_REALTIME, &at) != 0)
        return -1;
    out->tv_sec = at.tv_sec;
    out->tv_usec = at.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out)
{
    struct timespec at;
    now(CLOCK_REALTIME, &at);
    if (out)
        *out = at.tv_sec;
    return at.tv_sec;
}
