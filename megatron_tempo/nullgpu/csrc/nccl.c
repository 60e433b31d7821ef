/* NCCL with ranks that are not there: a communicator believes what it is told, and a call answers at once.
 *
 * A call gives back what this rank sent, as if every other rank had sent the same to a gather and nothing to a sum.
 * Bytes are those of the larger buffer, which is what nccl-tests calls the size: a gather's output, a scatter's input. */
#include "nullgpu.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nccl.h>

#pragma GCC visibility push(default)

struct ncclComm { int rank, size, device; };

static __thread char last_error[512];

__attribute__((format(printf, 2, 3))) static ncclResult_t refuse(ncclResult_t result, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return result;
}

ncclResult_t ncclGetVersion(int *version)
{
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

/* Ids differ, so that a program which mixes them up behaves as it does with NCCL. */
ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    static int made;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "nullgpu %d %d", (int)getpid(),
             __atomic_add_fetch(&made, 1, __ATOMIC_RELAXED));
    return ncclSuccess;
}

static ncclResult_t create(ncclComm_t *comm, int size, int rank)
{
    if (size < 1 || rank < 0 || rank >= size) {
        *comm = NULL;
        return refuse(ncclInvalidArgument, "Invalid rank requested : %d/%d", rank, size);
    }
    *comm = nullgpu_handle();
    if (!*comm) return refuse(ncclSystemError, "no host memory");
    **comm = (struct ncclComm){rank, size, nullgpu_current_device()};
    nullgpu_count(NULLGPU_nccl_communicators, 1);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank)
{
    return create(comm, size, rank);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    return create(comm, size, rank);
}

ncclResult_t ncclCommInitRankScalable(ncclComm_t *comm, int size, int rank, int id_count, ncclUniqueId *ids,
                                      ncclConfig_t *config)
{
    return create(comm, size, rank);
}

ncclResult_t ncclCommInitAll(ncclComm_t *comms, int count, const int *devices)
{
    for (int i = 0; i < count; i++) {
        for (int j = 0; devices && j < i; j++)
            if (devices[i] == devices[j]) return refuse(ncclInvalidUsage, "Duplicate GPU detected : %d", devices[i]);
        ncclResult_t result = create(&comms[i], count, i);
        if (result) return result;
        comms[i]->device = devices ? devices[i] : i;
    }
    return ncclSuccess;
}

/* Who else has this color is not known: the new communicator has one rank. */
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *split, ncclConfig_t *config)
{
    *split = NULL;
    return color == NCCL_SPLIT_NOCOLOR ? ncclSuccess : create(split, 1, 0);
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    free(comm);
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) { return ncclCommDestroy(comm); }
ncclResult_t ncclCommFinalize(ncclComm_t comm) { return ncclSuccess; }

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank)
{
    *rank = comm->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int *size)
{
    *size = comm->size;
    return ncclSuccess;
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device)
{
    *device = comm->device;
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error)
{
    *error = ncclSuccess;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result)
{
    switch (result) {
    case ncclSuccess: return "no error";
    case ncclUnhandledCudaError: return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case ncclSystemError: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case ncclInternalError: return "internal error - please report this issue to the NCCL developers";
    case ncclInvalidArgument: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
    case ncclInvalidUsage: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case ncclRemoteError: return "remote process exited or there was a network error";
    case ncclInProgress: return "NCCL operation in progress";
    default: return "unknown result code";
    }
}

const char *ncclGetLastError(ncclComm_t comm) { return last_error; }

ncclResult_t ncclGroupStart(void) { return ncclSuccess; }
ncclResult_t ncclGroupEnd(void) { return ncclSuccess; }

static size_t width(ncclDataType_t type)
{
    switch (type) {
    case ncclInt8:
    case ncclUint8:
    case ncclFloat8e4m3:
    case ncclFloat8e5m2: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8;
    default: return 0;
    }
}

/* NCCL's own check of arguments. With NCCL_CHECK_POINTERS=1 it looks at the buffers as well; without, a kernel that
 * reads the host's memory ends the process. Nothing runs here, so the check is always made. */
static ncclResult_t check(const char *call, ncclComm_t comm, const void *buffer, size_t bytes, const char *name)
{
    if (!comm) return refuse(ncclInvalidArgument, "%s : comm argument is NULL", call);
    if (bytes && !buffer) return refuse(ncclInvalidArgument, "%s : %s argument is NULL", call, name);
    if (bytes && !nullgpu_is_visible(buffer, bytes))
        return refuse(ncclInvalidArgument, "%s : %s %p is not a valid pointer: not memory of a CUDA device", call, name,
                      buffer);
    struct nullgpu_piece piece;
    if (bytes && nullgpu_find(buffer, &piece) && piece.kind < NULLGPU_PINNED && piece.device != comm->device)
        return refuse(ncclInvalidArgument, "%s : %s allocated on device %d mismatchs with NCCL device %d", call, name,
                      piece.device, comm->device);
    return ncclSuccess;
}

struct call {
    const char *name;
    const void *from;
    size_t from_bytes;
    void *to;
    size_t to_bytes;
    enum nullgpu_counter counter; /* of calls; that of bytes is the next one */
};

static ncclResult_t run(const struct call *call, ncclComm_t comm, ncclDataType_t type, int root)
{
    if (!width(type)) return refuse(ncclInvalidArgument, "%s : invalid type %d", call->name, (int)type);
    ncclResult_t result = check(call->name, comm, call->from, call->from_bytes, "sendbuff");
    if (!result) result = check(call->name, comm, call->to, call->to_bytes, "recvbuff");
    if (result) return result;
    if (root < 0 || root >= comm->size)
        return refuse(ncclInvalidArgument, "%s : invalid root %d (root should be in the 0..%d range)", call->name, root,
                      comm->size);
    nullgpu_count(call->counter, 1);
    nullgpu_count(call->counter + 1, (double)(call->from_bytes > call->to_bytes ? call->from_bytes : call->to_bytes));
    return ncclSuccess;
}

/* The reductions of a communicator's own (PreMulSum) have higher numbers, which nobody keeps here. */
ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t *op, void *scalar, ncclDataType_t type,
                                      ncclScalarResidence_t residence, ncclComm_t comm)
{
    *op = ncclNumOps;
    return ncclSuccess;
}

ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t comm) { return ncclSuccess; }

ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream)
{
    size_t bytes = count * width(type);
    struct call call = {"AllReduce", from, bytes, to, bytes, NULLGPU_nccl_all_reduce_calls};
    ncclResult_t result = run(&call, comm, type, 0);
    if (!result) nullgpu_copy(to, from, bytes);
    return result;
}

ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream)
{
    size_t bytes = count * width(type);
    bool is_root = comm && comm->rank == root; /* only the root's input is looked at */
    struct call call = {"Broadcast", is_root ? from : NULL, is_root ? bytes : 0, to, bytes, NULLGPU_nccl_broadcast_calls};
    ncclResult_t result = run(&call, comm, type, root);
    if (!result && is_root) nullgpu_copy(to, from, bytes);
    return result;
}

ncclResult_t ncclBcast(void *buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream)
{
    return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}

ncclResult_t ncclReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t stream)
{
    size_t bytes = count * width(type);
    bool is_root = comm && comm->rank == root;
    struct call call = {"Reduce", from, bytes, is_root ? to : NULL, is_root ? bytes : 0, NULLGPU_nccl_reduce_calls};
    ncclResult_t result = run(&call, comm, type, root);
    if (!result && is_root) nullgpu_copy(to, from, bytes);
    return result;
}

ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream)
{
    size_t bytes = count * width(type), size = comm ? (size_t)comm->size : 0;
    struct call call = {"AllGather", from, bytes, to, size * bytes, NULLGPU_nccl_all_gather_calls};
    ncclResult_t result = run(&call, comm, type, 0);
    for (size_t rank = 0; !result && rank < size; rank++) nullgpu_copy((char *)to + rank * bytes, from, bytes);
    return result;
}

ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream)
{
    size_t bytes = count * width(type), size = comm ? (size_t)comm->size : 0;
    struct call call = {"ReduceScatter", from, size * bytes, to, bytes, NULLGPU_nccl_reduce_scatter_calls};
    ncclResult_t result = run(&call, comm, type, 0);
    if (!result) nullgpu_copy(to, (const char *)from + (size_t)comm->rank * bytes, bytes);
    return result;
}

ncclResult_t ncclAlltoAll(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,
                          cudaStream_t stream)
{
    size_t bytes = (comm ? (size_t)comm->size : 0) * count * width(type);
    struct call call = {"AlltoAll", from, bytes, to, bytes, NULLGPU_nccl_all_to_all_calls};
    ncclResult_t result = run(&call, comm, type, 0);
    if (!result) nullgpu_copy(to, from, bytes);
    return result;
}

ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream)
{
    struct call call = {"Send", from, count * width(type), NULL, 0, NULLGPU_nccl_send_calls};
    return run(&call, comm, type, peer);
}

/* What is received is what was in the buffer: nobody sent it. */
ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream)
{
    struct call call = {"Recv", NULL, 0, to, count * width(type), NULLGPU_nccl_recv_calls};
    return run(&call, comm, type, peer);
}

ncclResult_t ncclMemAlloc(void **result, size_t size)
{
    return cudaMalloc(result, size) ? refuse(ncclUnhandledCudaError, "out of memory") : ncclSuccess;
}

ncclResult_t ncclMemFree(void *at)
{
    return cudaFree(at) ? refuse(ncclUnhandledCudaError, "invalid argument") : ncclSuccess;
}
