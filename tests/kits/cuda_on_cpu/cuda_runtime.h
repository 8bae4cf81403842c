// As much of CUDA as dense.cu uses, on the CPU, for tests without a GPU: one block after another, a fibre for each
// thread, barriers, and the tensor core instruction as the PTX manual defines its fragments. Reads through __ldg are
// checked against the memory that the test has told of. Lanes that part ways at an instruction never meet: aborted.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using __half = _Float16;
struct __nv_bfloat16 { uint16_t bits; };
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline float __half2float(__half value) { return value; }
inline uint16_t __half_as_ushort(__half value) { uint16_t b; memcpy(&b, &value, 2); return b; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t b;
  memcpy(&b, &value, 4);
  return {static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t b = uint32_t(value.bits) << 16;
  float f;
  memcpy(&f, &b, 4);
  return f;
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda on cpu: %s\n", what);
  abort();
}

struct Range { const char *begin, *end; };
inline std::vector<Range> readable;

struct Barrier { int size, arrived = 0, generation = 0; };
struct Fragments { uint32_t a[4], b[2]; };

inline dim3 thread, block, grid, threads;
inline ucontext_t scheduler;
inline ucontext_t* running;
inline bool progress;

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress = true;
  }
  while (barrier.generation == generation) swapcontext(running, &scheduler);
}

inline Barrier all;
inline std::vector<Barrier> warps;
inline std::vector<Fragments> fragments;
inline std::function<void()> body;
inline std::vector<char> finished;

inline void enter() {
  body();
  finished[thread.x] = 1;
  progress = true;
}

inline void run_block() {
  const int count = threads.x;
  constexpr size_t kStack = 1 << 16;
  std::vector<ucontext_t> fibres(count);
  std::unique_ptr<char[]> stacks(new char[count * kStack]);
  finished.assign(count, 0);
  all = {count};
  warps.assign(count / 32, {32});
  fragments.assign(count, {});
  for (int i = 0; i < count; ++i) {
    getcontext(&fibres[i]);
    fibres[i].uc_stack = {};
    fibres[i].uc_stack.ss_sp = stacks.get() + i * kStack;
    fibres[i].uc_stack.ss_size = kStack;
    fibres[i].uc_link = &scheduler;
    makecontext(&fibres[i], enter, 0);
  }
  while (std::count(finished.begin(), finished.end(), 0)) {
    progress = false;
    for (int i = 0; i < count; ++i) {
      if (finished[i]) continue;
      thread.x = i;
      running = &fibres[i];
      swapcontext(&scheduler, running);
    }
    if (!progress) fail("threads wait for each other");
  }
}

inline float part(uint32_t pair, int which, bool bfloat16) {
  const uint16_t bits = pair >> (16 * which);
  if (bfloat16) return __bfloat162float({bits});
  __half value;
  memcpy(&value, &bits, 2);
  return value;
}

// mma.m16n8k16: A[row][k] of lane 4 * (row % 8) + k % 8 / 2, register row / 8 + 2 * (k / 8); B[k][column] of lane
// 4 * column + k % 8 / 2, register k / 8; C's of rows lane / 4 + 8 * (i / 2), columns 2 * (lane % 4) + i % 2.
inline void multiply_add(const char* instruction, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (!strstr(instruction, "mma.sync.aligned.m16n8k16.row.col.f32.")) fail("an unknown instruction");
  const bool bfloat16 = strstr(instruction, "bf16.bf16");
  const int first = thread.x / 32 * 32, lane = thread.x % 32;
  Barrier& warp = warps[thread.x / 32];
  fragments[thread.x] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  wait(warp);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Fragments& left = fragments[first + 4 * (row % 8) + k % 8 / 2];
      const Fragments& right = fragments[first + 4 * column + k % 8 / 2];
      c[i] += part(left.a[row / 8 + 2 * (k / 8)], k % 2, bfloat16) * part(right.b[k / 8], k % 2, bfloat16);
    }
  }
  wait(warp);
}

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define gridDim emulated::grid
#define blockDim emulated::threads
#define asm(...) emulated::multiply_add(#__VA_ARGS__, c, a, b0, b1)

inline void __syncthreads() { emulated::wait(emulated::all); }
inline int min(int a, int b) { return std::min(a, b); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int shift) {
  return static_cast<uint32_t>((uint64_t(high) << 32 | low) >> (shift % 32));
}

template <typename T>
T __ldg(const T* from) {
  const char* begin = reinterpret_cast<const char*>(from);
  const auto holds = [=](const emulated::Range& r) { return r.begin <= begin && begin + sizeof(T) <= r.end; };
  if (!std::any_of(emulated::readable.begin(), emulated::readable.end(), holds)) emulated::fail("read out of bounds");
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) emulated::fail("read that is not aligned");
  return *from;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;  // few: blocks take several tiles
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid argument" : "no error"; }

template <typename P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 threads, void** arguments, size_t, cudaStream_t) {
  emulated::grid = grid;
  emulated::threads = threads;
  emulated::body = [=] { kernel(*static_cast<P*>(arguments[0])); };
  for (unsigned i = 0; i < grid.x; ++i) {
    emulated::block.x = i;
    emulated::run_block();
  }
  return cudaSuccess;
}

extern "C" inline __attribute__((used)) void sqs_readable(const char* begin, int64_t size, int clear) {
  if (clear) emulated::readable.clear();
  emulated::readable.push_back({begin, begin + size});
}
