// y = x W^T for up to 16 rows of x: W [N, K] in the dense form, codes of 1 to 4 bits, one table for the whole tensor.
//
// Two neighbouring codes index a table of pairs of values in shared memory, 4^bits entries. Each lane has a copy of
// its own in its own bank, so that 32 look-ups are one access: 32 KB at 4 bits, 2 KB at 2. What comes out is half of
// an operand of a tensor core instruction: a warp multiplies 16 outputs with 8 rows of x, sums in float32.
//
// The instruction wants 16 inputs, two pairs of each lane of a quad, and it does not care which, as long as W and x
// agree: a lane reads 32 neighbouring codes of two outputs and the same 32 inputs of a row of x, and feeds 8
// instructions from them without moving anything between lanes. The 8 warps of a block share K, and their sums are
// added in order: no atomics, results repeat.
//
// No PyTorch in here: a plain C function in a shared library, for any version of it.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kWarps = 8, kOutputs = 16, kRows = 8, kCodes = 32, kChunk = 4 * kCodes;

struct Problem {
  const void* x;         // [rows, inputs]
  const uint32_t* codes;
  const float* table;    // [size]
  const float* scales;   // [outputs] or null
  const void* bias;      // [outputs], of the type of x, or null
  void* y;               // [rows, outputs]
  int size, rows, outputs, inputs;
};

template <typename T>
__device__ T rounded(float value);
template <>
__device__ __half rounded(float value) { return __float2half_rn(value); }
template <>
__device__ __nv_bfloat16 rounded(float value) { return __float2bfloat16_rn(value); }
__device__ float widened(__half value) { return __half2float(value); }
__device__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ uint32_t bits_of(__half value) { return __half_as_ushort(value); }
__device__ uint32_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 32 codes, BITS words.
template <int BITS>
__device__ void load_codes(uint32_t (&to)[BITS], const uint32_t* from) {
  if constexpr (BITS == 4) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
    to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
  } else if constexpr (BITS == 2) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(from));
    to[0] = words.x, to[1] = words.y;
  } else {
#pragma unroll
    for (int i = 0; i < BITS; ++i) to[i] = __ldg(from + i);
  }
}

// The values of codes 2 * PAIR and 2 * PAIR + 1 of 32. An entry's 32 copies take 128 bytes.
template <int BITS>
__device__ uint32_t look_up(const uint32_t (&words)[BITS], int pair, const uint32_t* table, uint32_t lane_offset) {
  constexpr uint32_t kMask = ((1u << 2 * BITS) - 1) << 7;
  const int first = 2 * BITS * pair, word = first / 32, shift = first % 32;
  uint32_t moved;
  if (shift + 2 * BITS > 32) {
    moved = __funnelshift_r(words[word], words[word + 1 < BITS ? word + 1 : word], shift) << 7;
  } else {
    moved = shift >= 7 ? words[word] >> (shift - 7) : words[word] << (7 - shift);
  }
  const uint32_t offset = (moved & kMask) | lane_offset;
  return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(table) + offset);
}

// GROUPS: of 8 rows of x. TILES: of 16 outputs, that use what was read of x: more rows of x are more to read again.
template <typename T, int BITS, int GROUPS, int TILES>
__global__ void __launch_bounds__(32 * kWarps, TILES == 1 ? 4 : 2) multiply(const Problem p) {
  constexpr int kPairs = 1 << 2 * BITS, kBlock = TILES * kOutputs;
  __shared__ __align__(16) uint32_t table[kPairs * 32];
  __shared__ float sums[kWarps][kRows][kBlock + 1];

  for (int i = threadIdx.x; i < kPairs * 8; i += blockDim.x) {
    const int pair = i / 8, low = pair & ((1 << BITS) - 1), high = pair >> BITS;
    const uint32_t value = bits_of(rounded<T>(low < p.size ? p.table[low] : 0.0f)) |
                           bits_of(rounded<T>(high < p.size ? p.table[high] : 0.0f)) << 16;
    reinterpret_cast<uint4*>(table)[i] = make_uint4(value, value, value, value);
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, high = lane / 4, quad = lane % 4;
  const uint32_t lane_offset = 4 * lane;
  const int row_words = p.inputs / 32 * BITS, chunks = (p.inputs + kChunk - 1) / kChunk;
  const T* x = static_cast<const T*>(p.x);

  for (int first = blockIdx.x * kBlock; first < p.outputs; first += gridDim.x * kBlock) {
    const uint32_t* rows[2 * TILES];  // of a tile: this one and the eighth behind it
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
      rows[i] = p.codes + int64_t(min(first + high + 8 * i, p.outputs - 1)) * row_words;
    }
    float c[GROUPS][TILES][4] = {};
    uint32_t next[2 * TILES][BITS] = {};
    const auto fetch = [&](int chunk) {
      const int k = chunk * kChunk + quad * kCodes;
      if (k >= p.inputs) return;
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) load_codes<BITS>(next[i], rows[i] + k / 32 * BITS);
    };
    fetch(warp);
    for (int chunk = warp; chunk < chunks; chunk += kWarps) {
      uint32_t words[2 * TILES][BITS];
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) {
#pragma unroll
        for (int word = 0; word < BITS; ++word) words[i][word] = next[i][word];
      }
      fetch(chunk + kWarps);
      const int k = chunk * kChunk + quad * kCodes;
#pragma unroll
      for (int part = 0; part < 4; ++part) {  // 8 inputs: two instructions
        uint4 operand[GROUPS];
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
          const int m = group * kRows + high;
          const bool there = m < p.rows && k < p.inputs;
          const T* from = x + int64_t(m) * p.inputs + k + 8 * part;
          operand[group] = there ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const int pair = 4 * part + 2 * step;
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            const auto& low = words[2 * tile];
            const auto& up = words[2 * tile + 1];
            const uint32_t a[4] = {look_up<BITS>(low, pair, table, lane_offset),
                                   look_up<BITS>(up, pair, table, lane_offset),
                                   look_up<BITS>(low, pair + 1, table, lane_offset),
                                   look_up<BITS>(up, pair + 1, table, lane_offset)};
#pragma unroll
            for (int group = 0; group < GROUPS; ++group) {
              const uint4 b = operand[group];
              multiply_add(c[group][tile], a, step ? b.z : b.x, step ? b.w : b.y, T());
            }
          }
        }
      }
    }
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[warp][2 * quad + i % 2][tile * kOutputs + high + 8 * (i / 2)] = c[group][tile][i];
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < kRows * kBlock; i += blockDim.x) {
        const int m = group * kRows + i / kBlock, n = first + i % kBlock;
        if (m >= p.rows || n >= p.outputs) continue;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += sums[w][i / kBlock][i % kBlock];
        if (p.scales) sum *= p.scales[n];
        if (p.bias) sum += widened(static_cast<const T*>(p.bias)[n]);
        static_cast<T*>(p.y)[int64_t(m) * p.outputs + n] = rounded<T>(sum);
      }
      __syncthreads();
    }
  }
}

template <typename T, int BITS>
cudaError_t start(const Problem& p, int processors, cudaStream_t stream) {
  const bool few = p.rows <= kRows;
  const auto kernel = few ? multiply<T, BITS, 1, 1> : multiply<T, BITS, 2, 2>;
  const int outputs = few ? kOutputs : 2 * kOutputs;  // of a block at a time
  const int tiles = (p.outputs + outputs - 1) / outputs, most = (few ? 4 : 2) * processors;
  const int rounds = (tiles + most - 1) / most;  // the same number of tiles for each block
  const int blocks = (tiles + rounds - 1) / rounds;
  void* arguments[] = {const_cast<Problem*>(&p)};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(32 * kWarps), arguments, 0, stream);
}

template <typename T>
cudaError_t start(const Problem& p, int bits, int processors, cudaStream_t stream) {
  switch (bits) {
    case 1: return start<T, 1>(p, processors, stream);
    case 2: return start<T, 2>(p, processors, stream);
    case 3: return start<T, 3>(p, processors, stream);
    case 4: return start<T, 4>(p, processors, stream);
    default: return cudaErrorInvalidValue;
  }
}

bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace

// Returns a cudaError_t; starts nothing where the problem is not one of these kernels.
extern "C" int sqs_linear(int device, void* stream, int is_bfloat16, int bits, int rows, int outputs, int inputs,
                          int size, const void* x, const void* codes, const void* table, const void* scales,
                          const void* bias, void* y) {
  if (rows < 1 || rows > 2 * kRows || outputs < 1 || inputs < 1 || inputs % kCodes || size < 1 || bits < 1 ||
      bits > 4 || !aligned(x, 16) || !aligned(codes, bits == 3 ? 4 : 4 * bits)) {
    return cudaErrorInvalidValue;
  }
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  int processors = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  const Problem p{x, static_cast<const uint32_t*>(codes), static_cast<const float*>(table),
                  static_cast<const float*>(scales), bias, y, size, rows, outputs, inputs};
  const auto to = static_cast<cudaStream_t>(stream);
  return is_bfloat16 ? start<__nv_bfloat16>(p, bits, processors, to) : start<__half>(p, bits, processors, to);
}

extern "C" const char* sqs_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
