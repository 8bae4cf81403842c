// Matrix products with weights of several codebooks on CPUs (sqs_pyro/kernels/rows.py writes the layout).
//
// A table of a row, or of some inputs of it, has to stay in a register while it is looked up, so here a word of 64 bytes
// holds codes of one row: of 32 P consecutive inputs, P = 16 / B. Code c of 16-bit half h belongs to input 32 c + h, so
// that one shift brings 32 neighbouring inputs to the bottom. Lanes are summed up at the end.

#include <algorithm>

#include "operators.h"

namespace sqs {

constexpr int kChunk = 2 * kRows;  // inputs that one code of each half of a word belongs to
constexpr int kWidth = 8;          // rows of x at a time

// ---- chunks of 32 inputs ----------------------------------------------------------------------------------------

// `[16]` even inputs, `[16]` odd ones.
void pack_chunk(const float* x, int64_t count, float* to) {
  for (int64_t i = 0; i < kChunk; ++i) to[i % 2 * kRows + i / 2] = i < count ? x[i] : 0.0f;
}

template <int B, int M>
inline void add_chunk(const FloatKernel<B>& kernel, const uint32_t* word, int c, const float* x, Floats (&sums)[M]) {
  for (int lane = 0; lane < kRows; lane += kLanes) {
    const Words codes = load<Words>(word + lane);
    const Floats even = kernel.table[codes >> (B * c)], odd = kernel.table[codes >> (16 + B * c)];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m] += even * load<Floats>(x + m * kChunk + lane);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m] += odd * load<Floats>(x + m * kChunk + kRows + lane);
  }
}

#if defined(__AVX512BF16__)
void pack_chunk(const BFloat16* x, int64_t count, uint32_t* to) {
  std::memset(to, 0, 64);
  std::memcpy(to, x, 2 * std::min<int64_t>(count, kChunk));
}

template <int B, int M>
inline void add_chunk(const PairKernel<B>& kernel, const uint32_t* word, int c, const uint32_t* x, Floats (&sums)[M]) {
  const __m512bh weights = kernel.look_up(_mm512_srl_epi16(load<__m512i>(word), _mm_cvtsi32_si128(B * c)));
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    sums[m] = (Floats)_mm512_dpbf16_ps((__m512)sums[m], weights, load<__m512bh>(x + m * kRows));
  }
}
#endif

inline float total(Floats sum) {
  float all = 0;
  for (int i = 0; i < kLanes; ++i) all += sum[i];
  return all;
}

// ---- rows -------------------------------------------------------------------------------------------------------

// One output for M rows of x, of which `count` are there; `x` is `[chunk][M][32]`.
template <class Kernel, int B, int M, class T>
void output(const Weight& w, const float* bias, const typename Kernel::X* x, int64_t n, int64_t count, T* y) {
  constexpr int P = kPairs<B>, A = M == 1 ? 4 : M == 4 ? 2 : 1;  // independent sums
  constexpr int units = kChunk / Kernel::kInputs * M;            // of x, a chunk
  Floats sums[A][M] = {};
  const int64_t of_table = w.of_table();
  const bool whole_rows = of_table >= w.inputs;
  const int64_t chunks = whole_rows ? w.words * P : of_table / kChunk, end = whole_rows ? chunks : w.inputs / kChunk;
  const uint32_t* words = w.words_data() + n * w.words * kRows;
  const float* table = w.values() + (whole_rows ? n / (of_table / w.inputs) : n * (end / chunks)) * w.size();
  for (int64_t start = 0; start < end; start += chunks, table += w.size()) {
    const Kernel kernel(table, w.size());
    int64_t q = start;
    for (; q + A <= start + chunks; q += A) {
      __builtin_prefetch(words + (q / P + 64) * kRows);
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) {
        add_chunk(kernel, words + (q + a) / P * kRows, (q + a) % P, x + (q + a) * units, sums[a]);
      }
    }
    for (; q < start + chunks; ++q) add_chunk(kernel, words + q / P * kRows, q % P, x + q * units, sums[0]);
  }
  const float scale = w.scale() ? w.scale()[n] : 1.0f, offset = bias ? bias[n] : 0.0f;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int a = 1; a < A; ++a) sums[0][m] += sums[a][m];
    if (m < count) y[m * w.outputs + n] = T(total(sums[0][m]) * scale + offset);
  }
}

template <class Kernel, int B, int M, class T>
void panel(const Weight& w, const float* bias, const T* x, int64_t count, T* y) {
  constexpr int units = kChunk / Kernel::kInputs * M;
  const int64_t chunks = w.words * kPairs<B>;
  const auto packed = scratch<typename Kernel::X>(chunks * units);
  std::fill(packed.get(), packed.get() + chunks * units, typename Kernel::X(0));
  for (int64_t q = 0; q * kChunk < w.inputs; ++q) {
    for (int64_t m = 0; m < count; ++m) {
      const int64_t at = q * kChunk;
      pack_chunk(x + m * w.inputs + at, w.inputs - at, packed.get() + q * units + m * units / M);
    }
  }
  torch::stable::parallel_for(0, w.outputs, 32, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) output<Kernel, B, M>(w, bias, packed.get(), n, count, y);
  });
}

template <class Kernel, int B, class T>
void multiply(const Weight& w, const float* bias, int64_t rows, const T* x, T* y) {
  for (int64_t m = 0; m < rows; m += kWidth) {
    const int64_t count = std::min<int64_t>(kWidth, rows - m);
    const T* from = x + m * w.inputs;
    T* to = y + m * w.outputs;
    if (count == 1) {
      panel<Kernel, B, 1>(w, bias, from, count, to);
    } else if (count <= 4) {
      panel<Kernel, B, 4>(w, bias, from, count, to);
    } else {
      panel<Kernel, B, kWidth>(w, bias, from, count, to);
    }
  }
}

// ---- operators --------------------------------------------------------------------------------------------------

Tensor linear_rows(Tensor x, std::optional<Tensor> bias, Tensor codes, Tensor table, std::optional<Tensor> scales,
                   std::vector<int64_t> shape, int64_t bits) {
  const Weight weight(Layout::kRows, codes, table, scales, shape, bits);
  return linear(weight, shape, x, bias, false, []<class Kernel, int B, class T>(
      const Weight& w, const float* bias, int64_t rows, const T* x, T* y) { multiply<Kernel, B>(w, bias, rows, x, y); });
}

Tensor embedding_rows(Tensor indices, ScalarType dtype, Tensor codes, Tensor table, std::optional<Tensor> scales,
                      std::vector<int64_t> shape, int64_t bits) {
  return embedding(Weight(Layout::kRows, codes, table, scales, shape, bits), shape, indices, dtype);
}

}  // namespace sqs

STABLE_TORCH_LIBRARY_IMPL(sqs, CPU, m) {
  m.impl("linear_rows", TORCH_BOX(&sqs::linear_rows));
  m.impl("embedding_rows", TORCH_BOX(&sqs::embedding_rows));
}
