/* A CUDA runtime and driver with one H100 that computes nothing, for torch on a machine without a GPU.

   torch's shape-only tensors (FakeTensorMode) run no kernels. CUDA only has to report which devices exist and
   that streams and events are done. Any other call goes to the real runtime and fails, since it finds no driver.
   imagined_gpu.py adds one line for each driver function that torch looks up, compiles this and preloads it. */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <driver_types.h>

#define DONE { return 0; }
#define GIVES(pointer, value) { *(pointer) = (value); return 0; }

static unsigned long last_handle = 0x1000;

#undef cudaGetDeviceProperties
int cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "NVIDIA H100 80GB HBM3");
    found->major = 9;
    found->multiProcessorCount = 132;
    found->totalGlobalMem = 80ul << 30;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 2048;
    return 0;
}
int cudaGetDeviceCount(int *count) GIVES(count, 1)
int cudaGetDevice(int *device) GIVES(device, 0)
int cudaSetDevice(int device) DONE
int cudaDriverGetVersion(int *version) GIVES(version, 13000)
int cudaGetLastError(void) DONE
int cudaDeviceSynchronize(void) DONE
int cudaDeviceCanAccessPeer(int *can, int one, int other) GIVES(can, 0)
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; GIVES(greatest, -5) }
int cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags, int *is) {
    *found = dlsym(RTLD_DEFAULT, name);
    return *found == NULL;
}

int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) GIVES(stream, (void *)++last_handle)
int cudaStreamIsCapturing(void *stream, int *status) GIVES(status, 0)
int cudaStreamGetCaptureInfo(void *stream, int *status) GIVES(status, 0)
int cudaStreamQuery(void *stream) DONE
int cudaStreamSynchronize(void *stream) DONE
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) DONE
int cudaEventCreateWithFlags(void **event, unsigned flags) GIVES(event, (void *)++last_handle)
int cudaEventRecord(void *event, void *stream) DONE
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) DONE
int cudaEventQuery(void *event) DONE
int cudaEventSynchronize(void *event) DONE
int cudaEventElapsedTime(float *milliseconds, void *from, void *to) GIVES(milliseconds, 1)
int cudaEventDestroy(void *event) DONE

/* Host memory holds the few real tensors that random generators keep on the device. */
int cudaMalloc(void **found, size_t bytes) GIVES(found, calloc(1, bytes))
int cudaFree(void *memory) { free(memory); return 0; }
int cudaHostAlloc(void **found, size_t bytes, unsigned flags) GIVES(found, calloc(1, bytes))
int cudaFreeHost(void *memory) { free(memory); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) { memcpy(to, from, bytes); return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *memory) {
    memset(found, 0, sizeof *found);
    return 0;
}
int cudaMemGetInfo(size_t *available, size_t *total) { *available = 80ul << 30; GIVES(total, 80ul << 30) }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; GIVES(active, 1) }
