/* What the process asked of the device. counters.py reads it by name. */
#include "nullgpu.h"

#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#define MAX_STUBS 4096

static double values[NULLGPU_COUNTER_COUNT]; /* doubles: operations pass 2^64, and are exact to 2^53 as bytes */
static const char *stubs[MAX_STUBS];
static int stub_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static const char *const names[] = {
#define COLUMN(name) #name,
    NULLGPU_COUNTERS(COLUMN)
#undef COLUMN
};

void nullgpu_count(enum nullgpu_counter counter, double amount)
{
    pthread_mutex_lock(&lock);
    values[counter] += amount;
    pthread_mutex_unlock(&lock);
}

void nullgpu_stub_called(const char *name)
{
    pthread_mutex_lock(&lock);
    if (stub_count < MAX_STUBS) stubs[stub_count++] = name;
    pthread_mutex_unlock(&lock);
    const char *path = nullgpu_settings()->stub_log;
    int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    if (file < 0) return;
    char line[256];
    size_t length = strnlen(name, sizeof line - 1);
    memcpy(line, name, length);
    line[length] = '\n';
    ssize_t written = write(file, line, length + 1); /* one write: lines of several processes do not mix */
    (void)written;                                   /* the log is a help: a full disk must not stop the rehearsal */
    close(file);
}

/* For Python. */
NULLGPU_API int nullgpu_counter_count(void);
NULLGPU_API const char *nullgpu_counter_name(int index);
NULLGPU_API double nullgpu_counter_value(int index);
NULLGPU_API int nullgpu_stub_count(void);
NULLGPU_API const char *nullgpu_stub_name(int index);

int nullgpu_counter_count(void) { return NULLGPU_COUNTER_COUNT; }

const char *nullgpu_counter_name(int index) { return index >= 0 && index < NULLGPU_COUNTER_COUNT ? names[index] : NULL; }

double nullgpu_counter_value(int index)
{
    if (index < 0 || index >= NULLGPU_COUNTER_COUNT) return 0;
    pthread_mutex_lock(&lock);
    double value = values[index];
    pthread_mutex_unlock(&lock);
    return value;
}

int nullgpu_stub_count(void) { return __atomic_load_n(&stub_count, __ATOMIC_ACQUIRE); }

const char *nullgpu_stub_name(int index) { return index >= 0 && index < nullgpu_stub_count() ? stubs[index] : NULL; }
