/* cuBLAS: a product is counted as 2 m n k operations. */
#include "nullgpu.h"

#include <stdlib.h>

#include <cublas_v2.h>

#pragma GCC visibility push(default)

static cublasStatus_t product(double m, double n, double k, double batch)
{
    nullgpu_count(NULLGPU_products, 1);
    nullgpu_count(NULLGPU_flops, 2 * m * n * k * batch);
    return CUBLAS_STATUS_SUCCESS;
}

/* A handle keeps what is set on it, because torch sets a mode, and puts back the one that it read. */
struct handle { cublasMath_t math; cublasPointerMode_t pointer; cudaStream_t stream; };

cublasStatus_t cublasCreate(cublasHandle_t *handle)
{
    *handle = nullgpu_handle();
    return *handle ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}

cublasStatus_t cublasDestroy(cublasHandle_t handle)
{
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode)
{
    *mode = ((struct handle *)handle)->math;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode)
{
    ((struct handle *)handle)->math = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode(cublasHandle_t handle, cublasPointerMode_t *mode)
{
    *mode = ((struct handle *)handle)->pointer;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetPointerMode(cublasHandle_t handle, cublasPointerMode_t mode)
{
    ((struct handle *)handle)->pointer = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream)
{
    ((struct handle *)handle)->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetStream(cublasHandle_t handle, cudaStream_t *stream)
{
    *stream = ((struct handle *)handle)->stream;
    return CUBLAS_STATUS_SUCCESS;
}

/* The workspace is torch's own memory, which its allocator has counted. */
cublasStatus_t cublasSetWorkspace(cublasHandle_t handle, void *workspace, size_t size) { return CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n,
                            int k, const void *alpha, const void *A, cudaDataType Atype, int lda, const void *B,
                            cudaDataType Btype, int ldb, const void *beta, void *C, cudaDataType Ctype, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algo)
{
    return product(m, n, k, 1);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                                          int m, int n, int k, const void *alpha, const void *A, cudaDataType Atype,
                                          int lda, long long int strideA, const void *B, cudaDataType Btype, int ldb,
                                          long long int strideB, const void *beta, void *C, cudaDataType Ctype, int ldc,
                                          long long int strideC, int batch, cublasComputeType_t compute,
                                          cublasGemmAlgo_t algo)
{
    return product(m, n, k, batch);
}

cublasStatus_t cublasSgemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n,
                             int k, const float *alpha, const void *A, cudaDataType Atype, int lda, const void *B,
                             cudaDataType Btype, int ldb, const float *beta, void *C, cudaDataType Ctype, int ldc)
{
    return product(m, n, k, 1);
}

/* The families of one type each: C = alpha op(A) op(B) + beta C, one, many, and many by pointers. */
#define GEMM(LETTER, TYPE)                                                                                             \
    cublasStatus_t cublas##LETTER##gemm(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,     \
                                        int m, int n, int k, const TYPE *alpha, const TYPE *A, int lda, const TYPE *B, \
                                        int ldb, const TYPE *beta, TYPE *C, int ldc)                                   \
    {                                                                                                                  \
        return product(m, n, k, 1);                                                                                    \
    }                                                                                                                  \
    cublasStatus_t cublas##LETTER##gemmStridedBatched(                                                                 \
        cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,                \
        const TYPE *alpha, const TYPE *A, int lda, long long int strideA, const TYPE *B, int ldb,                      \
        long long int strideB, const TYPE *beta, TYPE *C, int ldc, long long int strideC, int batch)                   \
    {                                                                                                                  \
        return product(m, n, k, batch);                                                                                \
    }                                                                                                                  \
    cublasStatus_t cublas##LETTER##gemmBatched(cublasHandle_t handle, cublasOperation_t transa,                        \
                                               cublasOperation_t transb, int m, int n, int k, const TYPE *alpha,       \
                                               const TYPE *const A[], int lda, const TYPE *const B[], int ldb,         \
                                               const TYPE *beta, TYPE *const C[], int ldc, int batch)                  \
    {                                                                                                                  \
        return product(m, n, k, batch);                                                                                \
    }                                                                                                                  \
    cublasStatus_t cublas##LETTER##gemv(cublasHandle_t handle, cublasOperation_t trans, int m, int n,                  \
                                        const TYPE *alpha, const TYPE *A, int lda, const TYPE *x, int incx,            \
                                        const TYPE *beta, TYPE *y, int incy)                                           \
    {                                                                                                                  \
        return product(m, n, 1, 1);                                                                                    \
    }
GEMM(S, float)
GEMM(D, double)
