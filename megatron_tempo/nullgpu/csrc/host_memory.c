/* Host memory of a gigabyte and more is reserved address space too.
 *
 * Models that wait in host memory (parallel.offload) are never written, because copies of their size are not made. But
 * Linux refuses an allocation of more than RAM and swap, so a rehearsal of a large model would fail on a small machine.
 * Reserved address space is not counted. torch's allocator for the CPU takes its memory from posix_memalign and gives
 * it back with free; these two are taken over. */
#define _GNU_SOURCE
#include "nullgpu.h"

#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>

#define LARGE ((size_t)1 << 30)
#define MAX_LARGE 256

extern void __libc_free(void *);
extern void *__libc_memalign(size_t, size_t);
NULLGPU_API int posix_memalign(void **, size_t, size_t);
NULLGPU_API void free(void *);

static struct { void *at; size_t size; } large[MAX_LARGE];
static int large_count; /* read without the lock: 0 in most processes, so that free stays fast */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *take_large(size_t size)
{
    void *at = NULL;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAX_LARGE && !at; i++) {
        if (large[i].at) continue;
        at = nullgpu_reserve(size);
        if (!at) break;
        large[i].at = at;
        large[i].size = size;
        __atomic_add_fetch(&large_count, 1, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&lock);
    return at;
}

int posix_memalign(void **result, size_t alignment, size_t size)
{
    void *at = size >= LARGE && alignment <= 4096 ? take_large(size) : NULL;
    if (!at) at = __libc_memalign(alignment, size);
    if (!at) return ENOMEM;
    *result = at;
    return 0;
}

void free(void *at)
{
    /* A reservation starts on a page: almost no other pointer gets as far as the lock. */
    if (at && !((uintptr_t)at & 4095) && __atomic_load_n(&large_count, __ATOMIC_ACQUIRE)) {
        pthread_mutex_lock(&lock);
        for (int i = 0; i < MAX_LARGE; i++) {
            if (large[i].at != at) continue;
            munmap(at, large[i].size);
            large[i].at = NULL;
            __atomic_sub_fetch(&large_count, 1, __ATOMIC_RELEASE);
            pthread_mutex_unlock(&lock);
            return;
        }
        pthread_mutex_unlock(&lock);
    }
    __libc_free(at);
}
