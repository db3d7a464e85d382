/* Stand-in for the CUDA runtime below a host function that the CuTe DSL compiled.
 *
 * The compiled host code calls a small C interface (symbols with a leading underscore, named after
 * the runtime function they stand for) and, when it was built for TVM-FFI, a few helpers more. This
 * library defines them without any CUDA: what needs an answer goes to the callbacks that
 * cute_fa/sim/runtime.py installs. A host function that calls something not listed here fails to
 * link with the name of the missing symbol; to support it, add it below.
 *
 * Handles (libraries, kernels) are small integers that Python hands out, cast to pointers.
 * Return values are cudaError_t codes.
 */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_INITIALIZATION = 3,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_NOT_SUPPORTED = 801,
};

typedef struct {
  void *map;
  uint64_t address;
  const uint64_t *extents, *strides; /* elements, and bytes of all dimensions but the first */
  const uint32_t *box, *element_strides;
  int data_type, rank, swizzle, fill; /* as the driver's enumerations */
} TensorMapRequest;

typedef struct {
  int (*load_library)(const void *image, uint64_t *library);
  int (*unload_library)(uint64_t library);
  int (*get_kernel)(uint64_t library, const char *name, uint64_t *kernel);
  int (*set_kernel_attribute)(uint64_t kernel, int attribute, int value);
  int (*get_kernel_attribute)(uint64_t kernel, int attribute, int *value);
  int (*device_attribute)(int attribute, int *value);
  int (*launch)(uint64_t kernel, const void *config, void **parameters);
  int (*occupancy)(uint64_t kernel, int block_threads, uint64_t smem_bytes, int *blocks);
  int (*describe_failure)(char *text, int size);
  int (*encode_tensor_map)(const TensorMapRequest *request);
} Callbacks;

static Callbacks callbacks;

#define CALL(name, ...) \
  (callbacks.name ? callbacks.name(__VA_ARGS__) : CUDA_ERROR_INITIALIZATION)

void cute_fa_sim_install(const Callbacks *table) { callbacks = *table; }

/* Host code that the DSL links in memory looks its symbols up in everything that was loaded
 * globally, where the real runtime may define the same names. For it this file is compiled a second
 * time with a prefix on its names, and cute_fa/sim/linking.py lets the host code call those. */
#ifdef NAME_PREFIX
#define JOIN_EXPANDED(prefix, name) prefix##name
#define JOIN(prefix, name) JOIN_EXPANDED(prefix, name)
#define RUNTIME(name) JOIN(NAME_PREFIX, name)
#else
#define RUNTIME(name) name
#endif

/* Libraries and kernels. */

int RUNTIME(_cudaLibraryLoadData)(void **library, const void *image, void *jit_options,
                                  void *jit_values, unsigned num_jit, void *options, void *values,
                                  unsigned num_options) {
  uint64_t handle = 0;
  int error = CALL(load_library, image, &handle);
  *library = (void *)handle;
  return error;
}

int RUNTIME(_cudaLibraryUnload)(void *library) { return CALL(unload_library, (uint64_t)library); }

int RUNTIME(_cudaLibraryGetKernel)(void **kernel, void *library, const char *name) {
  uint64_t handle = 0;
  int error = CALL(get_kernel, (uint64_t)library, name, &handle);
  *kernel = (void *)handle;
  return error;
}

int RUNTIME(_cudaFuncSetAttribute)(void *kernel, int attribute, int value) {
  return CALL(set_kernel_attribute, (uint64_t)kernel, attribute, value);
}

int RUNTIME(_cudaKernelSetAttributeForDevice)(void *kernel, int attribute, int value, int device) {
  if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
  return CALL(set_kernel_attribute, (uint64_t)kernel, attribute, value);
}

int RUNTIME(_cuKernelGetAttribute)(int *value, int attribute, void *kernel, int device) {
  return CALL(get_kernel_attribute, (uint64_t)kernel, attribute, value);
}

int RUNTIME(_cudaOccupancyMaxActiveBlocksPerMultiprocessor)(int *blocks, void *kernel,
                                                            int block_threads, size_t smem_bytes) {
  return CALL(occupancy, (uint64_t)kernel, block_threads, smem_bytes, blocks);
}

/* Devices: there is one, number 0. */

int RUNTIME(_cudaGetDevice)(int *device) { *device = 0; return CUDA_SUCCESS; }
int RUNTIME(_cudaSetDevice)(int device) {
  return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
int RUNTIME(_cudaGetDeviceCount)(int *count) { *count = 1; return CUDA_SUCCESS; }
int RUNTIME(_cuDeviceGet)(int *device, int ordinal) {
  *device = 0;
  return RUNTIME(_cudaSetDevice)(ordinal);
}

int RUNTIME(_cudaDeviceGetAttribute)(int *value, int attribute, int device) {
  if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
  return CALL(device_attribute, attribute, value);
}

/* Launches run to completion before they return, so there is nothing to wait for. */

int RUNTIME(_cudaLaunchKernelEx)(const void *config, void *kernel, void **parameters) {
  return CALL(launch, (uint64_t)kernel, config, parameters);
}

int RUNTIME(_cudaDeviceSynchronize)(void) { return CUDA_SUCCESS; }
int RUNTIME(_cudaStreamSynchronize)(void *stream) { return CUDA_SUCCESS; }
int RUNTIME(_cudaGetLastError)(void) { return CUDA_SUCCESS; }

/* The DSL's own host code writes tensor maps inline; other programs have the driver encode them. */
int RUNTIME(_cuTensorMapEncodeTiled)(void *map, int data_type, uint32_t rank, void *address,
                                     const uint64_t *extents, const uint64_t *strides,
                                     const uint32_t *box, const uint32_t *element_strides,
                                     int interleave, int swizzle, int l2_promotion, int fill) {
  if (interleave != 0) return CUDA_ERROR_NOT_SUPPORTED;
  TensorMapRequest request = {map, (uint64_t)address, extents, strides, box, element_strides,
                              data_type, (int)rank, swizzle, fill};
  return CALL(encode_tensor_map, &request);
}

/* Device memory is host memory. */

int RUNTIME(_cudaMemcpy)(void *to, const void *from, size_t bytes, int kind) {
  memmove(to, from, bytes);
  return CUDA_SUCCESS;
}

int RUNTIME(_cudaMemcpyAsync)(void *to, const void *from, size_t bytes, int kind, void *stream) {
  return RUNTIME(_cudaMemcpy)(to, from, bytes, kind);
}

int RUNTIME(_cudaMemset)(void *to, int value, size_t bytes) {
  memset(to, value, bytes);
  return CUDA_SUCCESS;
}

int RUNTIME(_cudaMemsetAsync)(void *to, int value, size_t bytes, void *stream) {
  return RUNTIME(_cudaMemset)(to, value, bytes);
}

/* Error reporting. */

const char *RUNTIME(cuda_dialect_get_error_name)(int error) {
  switch (error) {
    case CUDA_SUCCESS: return "cudaSuccess";
    case CUDA_ERROR_INVALID_VALUE: return "cudaErrorInvalidValue";
    case CUDA_ERROR_INITIALIZATION: return "cudaErrorInitializationError";
    case 9: return "cudaErrorInvalidConfiguration";
    case CUDA_ERROR_INVALID_DEVICE: return "cudaErrorInvalidDevice";
    case 209: return "cudaErrorNoKernelImageForDevice";
    case 500: return "cudaErrorSymbolNotFound";
    case 719: return "cudaErrorLaunchFailure";
    case CUDA_ERROR_NOT_SUPPORTED: return "cudaErrorNotSupported";
    default: return "cudaErrorUnknown";
  }
}

void RUNTIME(cuda_dialect_print_on_error)(int error) {
  if (error != CUDA_SUCCESS) fprintf(stderr, "%s\n", RUNTIME(cuda_dialect_get_error_name)(error));
}

/* The legacy host code asserts where it has no way to return the code; the launch itself returns
 * it, and Python raises what the callback kept. */
void RUNTIME(cuda_dialect_assert_success)(int error) {
  RUNTIME(cuda_dialect_print_on_error)(error);
}

/* TVM-FFI host functions. */

typedef void (*SetError)(const char *kind, const char *message);
enum { MESSAGE_BYTES = 4096 };

typedef void (*SetErrorParts)(const char *kind, const char **parts, int32_t num_parts);

/* The code, and what the callback that failed had to say, in the form that the DSL parses. */
static void format_code(char *message, size_t size, int error) {
  int length = snprintf(message, size, "CUDA Error Code: %d\n", error);
  CALL(describe_failure, message + length, (int)size - length);
}

/* *state is a word of the module, 0 until its library is loaded and its kernels are looked up.
 * The Python side lets one host function run at a time, so two threads do not race here. */
int RUNTIME(cuda_dialect_init_library_once)(void **state, int (*init)(void **),
                                            int (*load_to_device)(void **, int),
                                            SetError set_error) {
  if (*state) return CUDA_SUCCESS;
  void *library = NULL;
  int error = init(&library);
  if (!error) error = load_to_device(&library, 0);
  if (error) {
    char message[MESSAGE_BYTES];
    format_code(message, sizeof message, error);
    set_error("CUDADialectError", message);
    return error;
  }
  *state = library;
  return CUDA_SUCCESS;
}

/* Runs as a destructor of the module, possibly after Python: nothing is held that needs freeing. */
void RUNTIME(cuda_dialect_unload_library_once)(void **state) { *state = NULL; }

void RUNTIME(CuteDSLRT_TVMFFISetRaisedCudaError)(SetErrorParts set_error, int32_t error) {
  char message[MESSAGE_BYTES];
  format_code(message, sizeof message, error);
  const char *parts[] = {message};
  set_error("CUDADialectError", parts, 1);
}

void RUNTIME(CuteDSLRT_TVMFFISetRaisedCudaLaunchError)(
    SetErrorParts set_error, int32_t grid_x, int32_t grid_y, int32_t grid_z, int32_t block_x,
    int32_t block_y, int32_t block_z, int32_t block_threads, int64_t dynamic_smem, int32_t device,
    int32_t max_threads, int32_t max_block_x, int32_t max_block_y, int32_t max_block_z,
    int32_t max_grid_x, int32_t max_grid_y, int32_t max_grid_z, int32_t max_smem,
    int32_t max_smem_optin, const char *violation, const char *source_file, int32_t source_line,
    int32_t source_col, int32_t source_end_col) {
  char message[MESSAGE_BYTES];
  snprintf(message, sizeof message,
           "CUDA Error Code: 9; kind=cuda_launch; error_name=cudaErrorInvalidConfiguration; "
           "grid=%d,%d,%d; block=%d,%d,%d; block_threads=%d; dynamic_smem_bytes=%lld; device=%d; "
           "max_threads_per_block=%d; max_block_dim=%d,%d,%d; max_grid_dim=%d,%d,%d; "
           "max_shared_mem_per_block_bytes=%d; max_shared_mem_per_block_optin_bytes=%d; "
           "violation=%s; source_file=%s; source_line=%d; source_col=%d; source_end_col=%d",
           grid_x, grid_y, grid_z, block_x, block_y, block_z, block_threads,
           (long long)dynamic_smem, device, max_threads, max_block_x, max_block_y, max_block_z,
           max_grid_x, max_grid_y, max_grid_z, max_smem, max_smem_optin, violation, source_file,
           source_line, source_col, source_end_col);
  const char *parts[] = {message};
  set_error("CUDADialectError", parts, 1);
}

/* DLPack's C exchange interface of a tensor type (dlpack.h, DLPackExchangeAPI), with CPU tensors
 * reported as tensors of CUDA device 0 while a simulated device is entered. Consumers remember the
 * address of the table, maybe since before the first device, so the table itself is changed. */

typedef struct {
  uint32_t major, minor;
  void *previous;
  void *allocate;
  int (*managed_from_object)(void *object, void **out);
  void *managed_to_object;
  int (*tensor_from_object)(void *object, void *out);
  int (*current_work_stream)(int device_type, int32_t device, void **stream);
} ExchangeApi;

typedef struct {
  void *data;
  int32_t device_type, device;
} TensorHead; /* how a DLTensor begins */

enum { DL_CPU = 1, DL_CUDA = 2, MANAGED_TENSOR_OFFSET = 32 };

static ExchangeApi original;

static void to_cuda(TensorHead *tensor) {
  if (tensor->device_type == DL_CPU) {
    tensor->device_type = DL_CUDA;
    tensor->device = 0;
  }
}

static int managed_from_object(void *object, void **out) {
  int error = original.managed_from_object(object, out);
  if (!error) to_cuda((TensorHead *)((char *)*out + MANAGED_TENSOR_OFFSET));
  return error;
}

static int tensor_from_object(void *object, void *out) {
  int error = original.tensor_from_object(object, out);
  if (!error) to_cuda(out);
  return error;
}

static int current_work_stream(int device_type, int32_t device, void **stream) {
  *stream = NULL;
  return 0;
}

/* Change the table at ``api``, or change it back; 0, or an errno if its memory stays read-only. */
int cute_fa_sim_cpu_is_cuda(ExchangeApi *api, int yes) {
  uintptr_t page = (uintptr_t)api & -(uintptr_t)sysconf(_SC_PAGESIZE);
  if (mprotect((void *)page, (uintptr_t)(api + 1) - page, PROT_READ | PROT_WRITE)) return errno;
  if (!yes) {
    *api = original;
    return 0;
  }
  original = *api;
  api->managed_from_object = managed_from_object;
  if (api->tensor_from_object) api->tensor_from_object = tensor_from_object;
  if (api->current_work_stream) api->current_work_stream = current_work_stream;
  return 0;
}
