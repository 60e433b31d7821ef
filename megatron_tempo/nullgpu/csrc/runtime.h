/* What the files of the runtime share. */
#ifndef NULLGPU_RUNTIME_H
#define NULLGPU_RUNTIME_H

#include "nullgpu.h"

#include <cuda_runtime_api.h>

#pragma GCC visibility push(default)

/* Keeps an error for cudaGetLastError, as the runtime does, and returns it. */
cudaError_t nullgpu_failed(cudaError_t error);

#pragma GCC visibility pop

#endif
