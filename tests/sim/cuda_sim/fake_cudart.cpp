// A CUDA runtime without a device: launches go to a callback, which hands them to the PTX simulator. So a launcher is
// tested as it is, with its grid, its shared memory and its arguments.
#include <cuda_runtime.h>

#include <map>
#include <string>
#include <vector>

namespace {

using Launch = void (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** args, size_t shared_bytes);

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

Launch launch_callback = nullptr;
int multiprocessors = 132, shared_limit = 0;
std::map<const void*, int> dynamic_limits;  // what kernels have asked for above 48 KiB
cudaError_t last_error = cudaSuccess;
std::vector<Configuration> configurations;

std::map<const void*, std::string>& kernels() {  // filled by static initialisers of the kernels' files
  static std::map<const void*, std::string> names;
  return names;
}

}  // namespace

extern "C" {

void fake_cudart_set(Launch callback, int num_multiprocessors, int max_shared_bytes) {
  launch_callback = callback;
  multiprocessors = num_multiprocessors;
  shared_limit = max_shared_bytes;
  dynamic_limits.clear();
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host_function] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared_bytes = c.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host_function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared_bytes, cudaStream_t) {
  const unsigned g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
  const auto asked = dynamic_limits.find(kernel);
  if (shared_bytes > 48 * 1024 && (asked == dynamic_limits.end() || shared_bytes > static_cast<size_t>(asked->second))) {
    return last_error = cudaErrorInvalidValue;  // as the runtime does
  }
  launch_callback(kernels().at(kernel).c_str(), g, b, args, shared_bytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "an error of the fake runtime"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount && attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    return cudaErrorInvalidValue;
  }
  *value = attribute == cudaDevAttrMultiProcessorCount ? multiprocessors : shared_limit;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > shared_limit) return cudaErrorInvalidValue;
  dynamic_limits[kernel] = value;
  return cudaSuccess;
}

}  // extern "C"
