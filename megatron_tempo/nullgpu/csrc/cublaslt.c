/* cuBLASLt: products by descriptors. The sizes are kept in them, for the count, and for what the hardware refuses. */
#include "nullgpu.h"

#include <stdlib.h>
#include <string.h>

#include <cublasLt.h>

#pragma GCC visibility push(default)

/* Both fit into the opaque structs, which a caller may have on its own stack (cublasLtMatrixLayoutInit). */
struct layout { uint64_t rows, cols; int64_t leading; int32_t type, batch; };
struct operation { int32_t compute, scale, transa, transb; };
_Static_assert(sizeof(struct layout) <= sizeof(cublasLtMatrixLayoutOpaque_t), "a layout has no room");
_Static_assert(sizeof(struct operation) <= sizeof(cublasLtMatmulDescOpaque_t), "an operation has no room");

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    *handle = nullgpu_handle();
    return *handle ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion(void) { return CUBLAS_VER_MAJOR * 10000 + CUBLAS_VER_MINOR * 100 + CUBLAS_VER_PATCH; }
size_t cublasLtGetCudartVersion(void) { return CUDART_VERSION; }

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t size, cudaDataType type,
                                                 uint64_t rows, uint64_t cols, int64_t leading)
{
    struct layout filled = {rows, cols, leading, (int32_t)type, 1};
    memcpy(layout, &filled, sizeof filled);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t leading)
{
    *layout = nullgpu_handle();
    if (!*layout) return CUBLAS_STATUS_ALLOC_FAILED;
    return cublasLtMatrixLayoutInit_internal(*layout, sizeof **layout, type, rows, cols, leading);
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    free(layout);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t name,
                                                const void *value, size_t size)
{
    struct layout *of = (struct layout *)layout;
    switch (name) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE: memcpy(&of->type, value, sizeof of->type); break;
    case CUBLASLT_MATRIX_LAYOUT_ROWS: memcpy(&of->rows, value, sizeof of->rows); break;
    case CUBLASLT_MATRIX_LAYOUT_COLS: memcpy(&of->cols, value, sizeof of->cols); break;
    case CUBLASLT_MATRIX_LAYOUT_LD: memcpy(&of->leading, value, sizeof of->leading); break;
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: memcpy(&of->batch, value, sizeof of->batch); break;
    default: break; /* strides and orders change neither the count nor what is refused */
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t operation, size_t size, cublasComputeType_t compute,
                                               cudaDataType_t scale)
{
    struct operation filled = {(int32_t)compute, (int32_t)scale, CUBLAS_OP_N, CUBLAS_OP_N};
    memcpy(operation, &filled, sizeof filled);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *operation, cublasComputeType_t compute,
                                        cudaDataType_t scale)
{
    *operation = nullgpu_handle();
    if (!*operation) return CUBLAS_STATUS_ALLOC_FAILED;
    return cublasLtMatmulDescInit_internal(*operation, sizeof **operation, compute, scale);
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t operation)
{
    free(operation);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t name,
                                              const void *value, size_t size)
{
    struct operation *of = (struct operation *)operation;
    if (name == CUBLASLT_MATMUL_DESC_TRANSA) memcpy(&of->transa, value, sizeof of->transa);
    if (name == CUBLASLT_MATMUL_DESC_TRANSB) memcpy(&of->transb, value, sizeof of->transb);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference)
{
    *preference = nullgpu_handle();
    return *preference ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    free(preference);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t name, const void *value,
                                                    size_t size)
{
    return CUBLAS_STATUS_SUCCESS;
}

/* Bytes of an element; 0 for one of less than a byte. */
static uint64_t width(int32_t type)
{
    switch (type) {
    case CUDA_R_8F_E4M3:
    case CUDA_R_8F_E5M2:
    case CUDA_R_8I:
    case CUDA_R_8U: return 1;
    case CUDA_R_16F:
    case CUDA_R_16BF: return 2;
    case CUDA_R_32F:
    case CUDA_R_32I: return 4;
    case CUDA_R_64F: return 8;
    default: return 0;
    }
}

static bool is_fp8(int32_t type) { return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2; }

/* The requirements for FP8 in cuBLAS's documentation: 16-byte alignment of every leading dimension and row, 32-bit
 * compute and scale, and A transposed with B not, before Blackwell's data centre parts. A GPU before 8.9 has no FP8. */
static bool is_supported(const struct operation *op, const struct layout *a, const struct layout *b,
                         const struct layout *d)
{
    if (!is_fp8(a->type) && !is_fp8(b->type)) return true;
    int capability = nullgpu_settings()->capability;
    if (capability < 89 || op->compute != CUBLAS_COMPUTE_32F || op->scale != CUDA_R_32F) return false;
    bool only_tn = capability < 100 || capability >= 120;
    if (only_tn && (op->transa != CUBLAS_OP_T || op->transb != CUBLAS_OP_N)) return false;
    if (a->type == CUDA_R_8F_E5M2 && b->type == CUDA_R_8F_E5M2) return false;
    const struct layout *all[] = {a, b, d};
    for (int i = 0; i < 3; i++)
        if (all[i]->rows * width(all[i]->type) % 16 || (uint64_t)all[i]->leading * width(all[i]->type) % 16)
            return false;
    return true;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                                              cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B,
                                              cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int *found)
{
    *found = 0;
    if (!is_supported((struct operation *)operation, (struct layout *)A, (struct layout *)B, (struct layout *)D))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    memset(results, 0, (size_t)wanted * sizeof *results);
    results[0].state = CUBLAS_STATUS_SUCCESS;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void *alpha, const void *A,
                              cublasLtMatrixLayout_t Adesc, const void *B, cublasLtMatrixLayout_t Bdesc,
                              const void *beta, const void *C, cublasLtMatrixLayout_t Cdesc, void *D,
                              cublasLtMatrixLayout_t Ddesc, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspace_bytes, cudaStream_t stream)
{
    const struct operation *op = (const struct operation *)operation;
    const struct layout *a = (const struct layout *)Adesc, *d = (const struct layout *)Ddesc;
    if (!is_supported(op, a, (const struct layout *)Bdesc, d)) return CUBLAS_STATUS_NOT_SUPPORTED;
    uint64_t inner = op->transa == CUBLAS_OP_N ? a->cols : a->rows;
    nullgpu_count(NULLGPU_products, 1);
    nullgpu_count(NULLGPU_flops, 2.0 * (double)d->rows * (double)d->cols * (double)inner * d->batch);
    return CUBLAS_STATUS_SUCCESS;
}
