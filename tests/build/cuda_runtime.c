/* Stand-in for the CUDA runtime below NVIDIA's own launch code.
 *
 * NVIDIA's launch layer (libcuda_dialect_runtime_static.a of the DSL) calls the documented CUDA
 * runtime API. Linked with this file it becomes a libcute_dsl_runtime.so that needs no driver:
 * every call is told to the function that was given to stand_in_answers, which says what comes of
 * it. FORWARDS lists the functions that the layer calls; the test takes it from the archive.
 * What the archive has not, the real library does: its path is REAL_LIBRARY.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>

typedef int (*Answer)(const char *name, const uint64_t *arguments);
static Answer answer;

void stand_in_answers(Answer function) { answer = function; }

enum { CUDA_ERROR_INITIALIZATION = 3 };

/* No function takes more than eight arguments, and all of them are integers or pointers. */
#define FORWARD(name)                                                                       \
  int name(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, \
           uint64_t h) {                                                                    \
    uint64_t arguments[] = {a, b, c, d, e, f, g, h};                                        \
    return answer ? answer(#name, arguments) : CUDA_ERROR_INITIALIZATION;                   \
  }
FORWARDS

const char *cudaGetErrorName(int error) {
  static _Thread_local char name[32];
  snprintf(name, sizeof name, "cudaError%d", error);
  return name;
}

const char *cudaGetErrorString(int error) { return "says the stand-in"; }

void CuteDSLRT_TVMFFISetRaisedCudaError(void *set_error, int32_t error) {
  void *real = dlopen(REAL_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  void (*raise)(void *, int32_t) = dlsym(real, "CuteDSLRT_TVMFFISetRaisedCudaError");
  raise(set_error, error);
}
