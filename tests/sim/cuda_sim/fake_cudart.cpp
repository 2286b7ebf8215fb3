// A CUDA runtime without a device: launches go to a callback, which hands them to the PTX simulator. So a launcher is
// tested as it is, with its grid, its shared memory and its arguments.
#include <cuda_runtime.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

using Launch = void (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** args, size_t shared_bytes,
                        bool overlaps);

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

Launch launch_callback = nullptr;
constexpr int kStaticBytes = 1024;  // of shared memory, that every kernel is said to have
struct Device {
  int multiprocessors = 132, shared_limit = 0;
};
std::vector<Device> devices{{}};  // one for each pair of numbers that was asked for
int current = 0;
std::map<std::pair<int, const void*>, int> dynamic_limits;  // of device and kernel: what was asked for above 48 KiB
int capability = 9;
void (*after_limit)() = nullptr;  // what another thread does once a limit is set
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
  for (current = 0; current < static_cast<int>(devices.size()); ++current) {
    const Device& d = devices[static_cast<size_t>(current)];
    if (d.multiprocessors == num_multiprocessors && d.shared_limit == max_shared_bytes) return;
  }
  devices.push_back({num_multiprocessors, max_shared_bytes});
}

void fake_cudart_capability(int major) { capability = major; }
void fake_cudart_after_limit(void (*callback)()) { after_limit = callback; }

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
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
  const size_t shared_bytes = config->dynamicSmemBytes;
  const auto asked = dynamic_limits.find({current, kernel});
  if (shared_bytes > 48 * 1024 && (asked == dynamic_limits.end() || shared_bytes > static_cast<size_t>(asked->second))) {
    return last_error = cudaErrorInvalidValue;  // as the runtime does
  }
  bool overlaps = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeProgrammaticStreamSerialization) return last_error = cudaErrorInvalidValue;
    overlaps = attribute.val.programmaticStreamSerializationAllowed != 0;
  }
  launch_callback(kernels().at(kernel).c_str(), g, b, args, shared_bytes, overlaps);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared_bytes,
                               cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  return cudaLaunchKernelExC(&config, kernel, args);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "an error of the fake runtime"; }
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute == cudaDevAttrComputeCapabilityMajor) {
    *value = capability;
    return cudaSuccess;
  }
  if (attribute != cudaDevAttrMultiProcessorCount && attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    return cudaErrorInvalidValue;
  }
  const Device& d = devices[static_cast<size_t>(device)];
  *value = attribute == cudaDevAttrMultiProcessorCount ? d.multiprocessors : d.shared_limit;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->sharedSizeBytes = kStaticBytes;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const int limit = devices[static_cast<size_t>(current)].shared_limit;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value + kStaticBytes > limit) {
    return cudaErrorInvalidValue;
  }
  dynamic_limits[{current, kernel}] = value;
  if (void (*callback)() = std::exchange(after_limit, nullptr)) callback();
  return cudaSuccess;
}

}  // extern "C"
