/* The memory of the devices: reserved addresses, and the bytes that are in use.
 *
 * A page of reserved address space costs nothing until it is written, and the only writes are copies of at most
 * copy_max bytes. So 80 GB of a device fit into a small process. */
#define _GNU_SOURCE
#include "nullgpu.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used[NULLGPU_MAX_DEVICES], peak[NULLGPU_MAX_DEVICES];
static struct nullgpu_piece *pieces; /* sorted by address; none overlap */
static int count, room;

static __thread int current_device;

int nullgpu_current_device(void) { return current_device; }

bool nullgpu_set_current_device(int device)
{
    if (device < 0 || device >= nullgpu_settings()->devices) return false;
    current_device = device;
    return true;
}

void *nullgpu_handle(void) { return calloc(1, 256); }

bool nullgpu_take(int device, size_t bytes)
{
    pthread_mutex_lock(&lock);
    size_t free_bytes = nullgpu_settings()->memory - used[device];
    bool fits = bytes <= free_bytes;
    if (fits) {
        used[device] += bytes;
        if (used[device] > peak[device]) peak[device] = used[device];
    }
    pthread_mutex_unlock(&lock);
    return fits;
}

void nullgpu_give_back(int device, size_t bytes)
{
    pthread_mutex_lock(&lock);
    used[device] -= bytes;
    pthread_mutex_unlock(&lock);
}

static size_t value_of(const size_t *values, int device)
{
    if (device < 0 || device >= NULLGPU_MAX_DEVICES) return 0;
    pthread_mutex_lock(&lock);
    size_t value = values[device];
    pthread_mutex_unlock(&lock);
    return value;
}

size_t nullgpu_used(int device) { return value_of(used, device); }
size_t nullgpu_peak(int device) { return value_of(peak, device); }

NULLGPU_API void nullgpu_reset_peak(int device);
void nullgpu_reset_peak(int device)
{
    if (device < 0 || device >= NULLGPU_MAX_DEVICES) return;
    pthread_mutex_lock(&lock);
    peak[device] = used[device];
    pthread_mutex_unlock(&lock);
}

void *nullgpu_reserve(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return NULL;
    madvise(at, bytes, MADV_NOHUGEPAGE); /* else a copy of 4 bytes would cost 2 MiB */
    return at;
}

/* The first piece that ends behind an address: an index, which is `count` where there is none. */
static int first_behind(const char *at)
{
    int low = 0, high = count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (pieces[middle].at + pieces[middle].size > at) high = middle;
        else low = middle + 1;
    }
    return low;
}

void nullgpu_add(struct nullgpu_piece piece)
{
    pthread_mutex_lock(&lock);
    if (count == room) {
        int wanted = room ? 2 * room : 1024;
        void *larger = realloc(pieces, (size_t)wanted * sizeof *pieces);
        if (!larger) abort(); /* no host memory for 32 KB */
        pieces = larger;
        room = wanted;
    }
    int place = first_behind(piece.at);
    memmove(pieces + place + 1, pieces + place, (size_t)(count - place) * sizeof *pieces);
    pieces[place] = piece;
    count++;
    pthread_mutex_unlock(&lock);
}

static bool find_locked(const char *at, struct nullgpu_piece *piece)
{
    int place = first_behind(at);
    if (place == count || pieces[place].at > at) return false;
    *piece = pieces[place];
    return true;
}

bool nullgpu_find(const void *at, struct nullgpu_piece *piece)
{
    pthread_mutex_lock(&lock);
    bool is_found = find_locked(at, piece);
    pthread_mutex_unlock(&lock);
    return is_found;
}

bool nullgpu_remove(const void *at, struct nullgpu_piece *piece)
{
    pthread_mutex_lock(&lock);
    bool is_found = find_locked(at, piece) && piece->at == at;
    if (is_found) {
        int place = first_behind(at);
        memmove(pieces + place, pieces + place + 1, (size_t)(--count - place) * sizeof *pieces);
    }
    pthread_mutex_unlock(&lock);
    return is_found;
}

/* First and last byte decide: a tensor in an expandable segment lies in several pieces. */
static bool is_within(const void *at, size_t bytes, bool with_host)
{
    struct nullgpu_piece first, last;
    if (!nullgpu_find(at, &first) || !nullgpu_find((const char *)at + (bytes ? bytes - 1 : 0), &last)) return false;
    return with_host || (first.kind < NULLGPU_PINNED && last.kind < NULLGPU_PINNED);
}

bool nullgpu_is_on_device(const void *at, size_t bytes) { return is_within(at, bytes, false); }
bool nullgpu_is_visible(const void *at, size_t bytes) { return is_within(at, bytes, true); }

void nullgpu_copy(void *to, const void *from, size_t bytes)
{
    if (to && from && to != from && bytes && bytes <= nullgpu_settings()->copy_max) memmove(to, from, bytes);
}

void *nullgpu_symbol(const void *key)
{
    static struct { const void *key; void *at; } symbols[512];
    static pthread_mutex_t symbol_lock = PTHREAD_MUTEX_INITIALIZER;
    void *found = NULL;
    pthread_mutex_lock(&symbol_lock);
    for (int i = 0; i < 512 && !found; i++) {
        if (symbols[i].key == key) found = symbols[i].at;
        else if (!symbols[i].key && (found = nullgpu_reserve(4096))) {
            symbols[i].key = key;
            symbols[i].at = found;
            nullgpu_add((struct nullgpu_piece){found, 4096, nullgpu_current_device(), NULLGPU_IMPORTED, NULL});
        }
    }
    pthread_mutex_unlock(&symbol_lock);
    return found;
}
