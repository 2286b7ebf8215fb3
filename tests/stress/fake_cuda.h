// A CUDA runtime without a device, for the prefetcher's CUDA engine: device memory is host memory, and streams are as late as
// they may be. What is queued runs when somebody waits for it, or when a draw from the seed says so: an order that the engine
// forgot to ask for shows as wrong rows. Captures, and the rules about events in them, are as in CUDA.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

void fake_cuda_seed(uint64_t seed);
void fake_cuda_fail(double share);  // of the copies, kernels and recorded events that are asked for
void fake_cuda_begin_capture(cudaStream_t stream);
void fake_cuda_end_capture();
void fake_cuda_replay();  // what was captured last
int64_t fake_cuda_live_events();
int64_t fake_cuda_first_device_calls();  // cudaSetDevice(0), and allocations there: each would make a context
bool fake_cuda_is_registered(const void* memory);
