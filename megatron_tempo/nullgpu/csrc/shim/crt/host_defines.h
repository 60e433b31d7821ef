/* Stands in for NVIDIA's crt/host_defines.h, which torch's wheels do not bring (the package nvidia-cuda-crt does).
 *
 * The headers of the runtime only take macros from it that mark functions and types for nvcc. To gcc they mean nothing.
 * This folder is searched last, so the real file is taken where there is one. */
#ifndef NULLGPU_CRT_HOST_DEFINES_H
#define NULLGPU_CRT_HOST_DEFINES_H

#define __host__
#define __device__
#define __global__
#define __shared__
#define __constant__
#define __managed__
#define __no_return__ __attribute__((noreturn))
#define __noinline__ __attribute__((noinline))
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __inline_hint__
#define __align__(n) __attribute__((aligned(n)))
#define __specialization_static
#define __location__(a)
#define __device_builtin__
#define __cudart_builtin__
#define __builtin_align__(n) __align__(n)
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDAAPI

#endif
