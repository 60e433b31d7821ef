/* The runtime's streams and events: everything on them is done as soon as it is asked for. */
#include "runtime.h"

#include <stdlib.h>

#pragma GCC visibility push(default)

struct stream { int device, priority; };
struct event { int device; unsigned flags; bool is_recorded; };

/* The default streams are the constants 0, 1 and 2. */
static struct stream *of(cudaStream_t stream) { return (uintptr_t)stream > 2 ? (struct stream *)stream : NULL; }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority)
{
    struct stream *made = nullgpu_handle();
    if (!made) return nullgpu_failed(cudaErrorMemoryAllocation);
    *made = (struct stream){nullgpu_current_device(), priority};
    *stream = (cudaStream_t)made;
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    if (!of(stream)) return nullgpu_failed(cudaErrorInvalidResourceHandle);
    free(of(stream));
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority)
{
    *priority = of(stream) ? of(stream)->priority : 0;
    return cudaSuccess;
}

cudaError_t cudaStreamGetDevice(cudaStream_t stream, int *device)
{
    *device = of(stream) ? of(stream)->device : nullgpu_current_device();
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    nullgpu_count(NULLGPU_stream_synchronisations, 1);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }

/* Functions that a stream calls on the host are called at once: torch's pinned memory is given back by one. */
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data)
{
    function(data);
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned flags)
{
    function(stream, cudaSuccess, data);
    return cudaSuccess;
}

/* A graph records what a stream would do, and a stream here does nothing: capture is refused. */
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    return nullgpu_failed(cudaErrorNotSupported);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count)
{
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (count) *count = 0;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    struct event *made = nullgpu_handle();
    if (!made) return nullgpu_failed(cudaErrorMemoryAllocation);
    *made = (struct event){nullgpu_current_device(), flags, false};
    *event = (cudaEvent_t)made;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    if (!event) return nullgpu_failed(cudaErrorInvalidResourceHandle);
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags)
{
    struct event *this = (struct event *)event;
    /* The driver refuses to record an event of one device on a stream of another. */
    if (!this || (of(stream) && of(stream)->device != this->device))
        return nullgpu_failed(cudaErrorInvalidResourceHandle);
    this->is_recorded = true;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    nullgpu_count(NULLGPU_event_synchronisations, 1);
    return cudaSuccess;
}

/* One millisecond, because there is no time: not 0, by which benchmarks such as Triton's would divide. */
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end)
{
    const struct event *first = (const struct event *)start, *second = (const struct event *)end;
    if (!first || !second || !first->is_recorded || !second->is_recorded ||
        ((first->flags | second->flags) & cudaEventDisableTiming))
        return nullgpu_failed(cudaErrorInvalidResourceHandle);
    *milliseconds = 1;
    return cudaSuccess;
}
