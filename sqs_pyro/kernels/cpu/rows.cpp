// Matrix products with weights of several codebooks on CPUs, or of scales for parts of rows (sqs_pyro/kernels/rows.py
// writes the layout).
//
// A table of a row, or of some inputs of it, has to stay in a register while it is looked up, so here a word of 64 bytes
// holds codes of P chunks of 32 neighbouring inputs of one row, P = 16 / B: code c of 16-bit half h belongs to input h of
// chunk c, so that one shift brings a chunk to the bottom. Chunks of all rows follow one another. Lanes are summed up at the
// end.

#include <algorithm>
#include <numeric>

#include "matrix_unit.h"
#include "operators.h"
#include "pixels.h"

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

// ---- pieces of rows -----------------------------------------------------------------------------------------------

// Inputs of one output that share a table and a scale, and what is asked of a weight for each of them: calls into torch.
template <int B>
struct Pieces {
  const uint32_t* words;
  const float* values;
  const Half* scales;  // of parts of rows, or none
  int64_t size, tables, of_table, of_part, inputs, parts;
  int64_t chunks, step;  // of a row, and of a piece
  Table<B> first;

  explicit Pieces(const Weight& w)
      : words(w.words_data()), values(w.values()), scales(w.part_scales()), size(w.size()), tables(w.tables()),
        of_table(w.of_table()), of_part(w.of_part()), inputs(w.inputs), parts(w.parts), chunks(w.chunks()),
        first(w.values(), w.size()) {
    const bool whole = of_table >= inputs && !parts;
    step = whole ? chunks : std::gcd(of_table, of_part) / kChunk;
  }

  // Values of output `n` from chunk `q` on, to the end of a piece.
  Table<B> table(int64_t n, int64_t q) const {
    const int64_t input = std::min(q * kChunk, inputs - 1);
    const float factor = scales ? widened(scales[n * parts + input / of_part]) : 1.0f;
    if (tables == 1) return Table<B>(first, factor);
    return Table<B>(Table<B>(values + (n * inputs + input) / of_table * size, size), factor);
  }
};

// ---- rows -------------------------------------------------------------------------------------------------------

// One output for M rows of x, of which `count` are there; `x` is `[chunk][M][32]`.
template <class Kernel, int B, int M, class T>
void output(const Weight& w, const Pieces<B>& pieces, const float* bias, const typename Kernel::X* x, int64_t n,
            int64_t count, T* y) {
  constexpr int P = kPairs<B>, A = M == 1 ? 4 : M == 4 ? 2 : 1;  // independent sums
  constexpr int units = kChunk / Kernel::kInputs * M;            // of x, a chunk
  Floats sums[A][M] = {};
  const int64_t before = n * pieces.chunks;
  const auto add = [&](const Kernel& kernel, int64_t q, Floats (&to)[M]) {
    add_chunk(kernel, pieces.words + (before + q) / P * kRows, (before + q) % P, x + q * units, to);
  };
  for (int64_t start = 0; start < pieces.chunks; start += pieces.step) {
    const Kernel kernel(pieces.table(n, start));
    int64_t q = start;
    const int64_t end = start + pieces.step;
    for (; q + A <= end; q += A) {
      fetch_ahead(pieces.words + (before + q) / P * kRows);
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) add(kernel, q + a, sums[a]);
    }
    for (; q + 2 <= end; q += 2) add(kernel, q, sums[0]), add(kernel, q + 1, sums[A - 1]);  // short pieces
    if (q < end) add(kernel, q, sums[0]);
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
  const Pieces<B> pieces(w);
  const auto packed = scratch<typename Kernel::X>(pieces.chunks * units);
  std::fill(packed.get(), packed.get() + pieces.chunks * units, typename Kernel::X(0));
  for (int64_t q = 0; q < pieces.chunks; ++q) {
    for (int64_t m = 0; m < count; ++m) {
      const int64_t at = q * kChunk;
      pack_chunk(x + m * w.inputs + at, w.inputs - at, packed.get() + q * units + m * units / M);
    }
  }
  torch::stable::parallel_for(0, w.outputs, 32, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) output<Kernel, B, M>(w, pieces, bias, packed.get(), n, count, y);
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

// ---- the matrix unit --------------------------------------------------------------------------------------------

#if defined(SQS_MATRIX_UNIT)
constexpr int kMany = 4;  // blocks of rows of x that share what is decoded

// Rows of x, `[here][inputs]`, as `[chunk][pair][rows]`, with zeros behind the last input and the last row.
void turn_rows(const BFloat16* x, int64_t here, int64_t rows, int64_t inputs, int64_t chunks, uint32_t* to) {
  std::fill(to, to + chunks * kUnits * rows, 0u);
  for (int64_t m = 0; m < here; ++m) {
    const BFloat16* row = x + m * inputs;
    for (int64_t k = 0; k < inputs; ++k) to[k / 2 * rows + m] |= uint32_t(row[k].x) << (16 * (k % 2));
  }
}

// `count` chunks of an output, `[chunk][output][pair]`; `to` is this output's in the first one.
template <int B>
void decode_row(const Pieces<B>& pieces, int64_t n, int64_t first, int64_t count, uint32_t* to) {
  constexpr int P = kPairs<B>, ahead = std::max(1, kUnits / P);
  const int64_t before = n * pieces.chunks;
  for (int64_t q = first; q < first + count;) {
    const int64_t end = std::min(first + count, (q / pieces.step + 1) * pieces.step);
    const PairKernel<B> kernel(pieces.table(n, q));
    while (q < end) {
      const int64_t word = (before + q) / P, place = (before + q) % P;
      const uint32_t* from = pieces.words + word * kRows;
      const __m512i codes = load<__m512i>(from);
      // What this output has next, and, into the second cache, what the next 16 outputs have.
      __builtin_prefetch(from + ahead * kRows);
      __builtin_prefetch(from + kRows * pieces.chunks / P * kRows, 0, 2);
      if (place == 0 && q + P <= end) {
#pragma GCC unroll 16
        for (int c = 0; c < P; ++c) {
          store(to + (q - first + c) * kBlock, kernel.look_up(_mm512_srli_epi16(codes, B * c)));
        }
        q += P;
      } else {  // a row or a piece that begins or ends within a word
        store(to + (q - first) * kBlock, kernel.look_up(_mm512_srl_epi16(codes, _mm_cvtsi32_si128(int(B * place)))));
        ++q;
      }
    }
  }
}

// 16 outputs for R blocks of rows of x, `of_x` numbers apart; weights stand on the left of the product.
template <int B, int R>
void outputs_by_unit(const Weight& w, const Pieces<B>& pieces, const Problem& p, int64_t tile, const uint32_t* x,
                     int64_t of_x, int64_t rows, int64_t first, BFloat16* y) {
  constexpr int depth = kPairs<B> * std::max(1, kUnits / kPairs<B>);  // chunks, of whole words
  alignas(64) uint32_t weights[depth * kBlock] = {};                  // zeros behind the last output
  alignas(64) float sums[kBlock];
  const int64_t chunks = pieces.chunks, outputs = std::min<int64_t>(kRows, w.outputs - tile * kRows);
  each<R>([&]<int r>() { clear_block<r>(); });
  for (int64_t start = 0; start < chunks; start += depth) {
    const int64_t count = std::min<int64_t>(depth, chunks - start);
    for (int64_t n = 0; n < outputs; ++n) {
      decode_row<B>(pieces, tile * kRows + n, start, count, weights + n * kUnits);
    }
    for (int64_t q = 0; q < count; ++q) {
      load_block<4>(weights + q * kBlock);
      each<R>([&]<int r>() {
        load_block<6 + r % 2>(x + r * of_x + (start + q) * kUnits * rows, 4 * rows);
        add_product<r, 4, 6 + r % 2>();
      });
    }
  }
  each<R>([&]<int r>() {
    store_block<r>(sums);  // [output][row of x]
    __m512 turned[kUnits];
    for (int n = 0; n < kUnits; ++n) turned[n] = load<__m512>(sums + n * kRows);
    turn(turned);
    for (int m = 0; m < kUnits; ++m) store(sums + m * kRows, turned[m]);
    for (int64_t m = 0; m < rows && first + r * rows + m < p.rows; ++m) {
      finish(p, tile, first + r * rows + m, sums + m * kRows, y);
    }
  });
}

template <int B>
void multiply_by_unit(const Weight& w, const float* bias, int64_t count, const BFloat16* x, BFloat16* y) {
  const Problem p{w.words_data(), w.words, count, w.inputs, w.outputs, bias, w.scale()};
  const Pieces<B> pieces(w);
  const int64_t rows = block_size(count), blocks = (count + rows - 1) / rows;
  const int64_t chunks = pieces.chunks, of_x = chunks * kUnits * rows;
  const auto turned = scratch<uint32_t>(blocks * of_x);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t here = std::min(rows, count - i * rows);
      turn_rows(x + i * rows * w.inputs, here, rows, w.inputs, chunks, turned.get() + i * of_x);
    }
  });
  torch::stable::parallel_for(0, (w.outputs + kRows - 1) / kRows, 1, [&](int64_t from, int64_t to) {
    Blocks registers;
    registers.shape(kRows, int(rows));
    for (int64_t tile = from; tile < to; ++tile) {
      for (int64_t i = 0; i < blocks; i += kMany) {
        each<kMany>([&]<int r>() {
          if (std::min<int64_t>(kMany, blocks - i) == r + 1) {
            outputs_by_unit<B, r + 1>(w, pieces, p, tile, turned.get() + i * of_x, of_x, rows, i * rows, y);
          }
        });
      }
    }
  });
}
#endif

// ---- operators --------------------------------------------------------------------------------------------------

Tensor linear_rows(Tensor x, std::optional<Tensor> bias, Tensor codes, Tensor table, std::optional<Tensor> scales,
                   std::vector<int64_t> shape, int64_t bits) {
  const Weight weight(Layout::kRows, codes, table, scales, shape, bits);
  // A single row of x takes less time in float32: the unit would wait for 16 outputs to be decoded.
  const bool unit = has_matrix_unit() && x.numel() > weight.inputs;
  return linear(weight, shape, x, bias, unit, []<class Kernel, int B, class T>(
      const Weight& w, const float* bias, int64_t rows, const T* x, T* y) {
#if defined(SQS_MATRIX_UNIT)
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (has_matrix_unit()) return multiply_by_unit<B>(w, bias, rows, x, y);
    }
#endif
    multiply<Kernel, B>(w, bias, rows, x, y);
  });
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
