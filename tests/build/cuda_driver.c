/* Stand-in for libcuda.so.1 that knows its version and fails to initialise, with the CUresult in
 * $STAND_IN_INIT or else CUDA_ERROR_NO_DEVICE. */
#include <stdlib.h>
#include <string.h>

enum { VERSION = 13000, NO_DEVICE = 100, NOT_INITIALIZED = 3 };

int cuInit(unsigned flags) {
  const char *error = getenv("STAND_IN_INIT");
  return error ? atoi(error) : NO_DEVICE;
}

int cuDriverGetVersion(int *version) {
  *version = VERSION;
  return 0;
}

static int everything_else(void) { return NOT_INITIALIZED; }

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long flags,
                        int *status) {
  *function = (void *)everything_else;
  if (!strcmp(name, "cuInit")) *function = (void *)cuInit;
  if (!strcmp(name, "cuDriverGetVersion")) *function = (void *)cuDriverGetVersion;
  if (!strncmp(name, "cuGetProcAddress", 16)) *function = (void *)cuGetProcAddress_v2;
  if (status) *status = 0;
  return 0;
}

int cuGetProcAddress(const char *name, void **function, int version, unsigned long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
