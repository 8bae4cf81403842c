// bfloat16 products in a matrix unit (AMX): rows of x times a tiled weight, 32 inputs of both at an instruction.
//
// One of its registers, a block, holds 32 inputs of up to 16 rows of x, another 32 inputs of a tile's 16 outputs: 16
// rows of pairs, as decoding writes them. A third one holds sums, `[rows of x][16 outputs]`. There are eight.

#pragma once

#include "processor.h"
#include "products.h"

#if defined(SQS_MATRIX_UNIT)

#include <numeric>
#include <utility>

namespace sqs {

constexpr int kUnits = 16;                 // pairs of inputs of a block
constexpr int kBlock = kUnits * kRows;     // numbers of a block of weights

// Codes that decode to whole blocks.
template <int B>
constexpr int kWordsAtOnce = kUnits / std::gcd(kUnits, kPairs<B>);
template <int B>
constexpr int kBlocksAtOnce = kWordsAtOnce<B> * kPairs<B> / kUnits;
template <int B>
constexpr int kDeep = std::max(1, kDepth / (2 * kUnits) / kBlocksAtOnce<B>);  // of them where rows of x share weights

struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Shapes of the registers: 0 to 3 for sums, 4 and 5 for what stands on the left of a product, 6 and 7 for what stands
// on the right. In the end they are what they were: another library may rely on its own.
class Blocks {
 public:
  Blocks() { asm volatile("sttilecfg %0" : "=m"(before_)); }
  ~Blocks() { asm volatile("ldtilecfg %0" ::"m"(before_)); }
  Blocks(const Blocks&) = delete;

  // `[rows, pairs]` times `[pairs, columns]`: 16 pairs, but those of the registers 5 and 7 may be fewer.
  void shape(int rows, int columns = kRows, int pairs = kUnits) {
    if (rows == rows_ && columns == columns_ && pairs == pairs_) return;
    rows_ = rows, columns_ = columns, pairs_ = pairs;
    Shapes shapes;
    for (int i = 0; i < 8; ++i) {
      const int here = i == 5 || i == 7 ? pairs : kUnits;
      shapes.rows[i] = uint8_t(i < 6 ? rows : here);
      shapes.bytes[i] = uint16_t(4 * (i == 4 || i == 5 ? here : columns));
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }

 private:
  Shapes before_;
  int rows_ = 0, columns_ = 0, pairs_ = 0;
};

// Intrinsics want a register's number as it is written, which a template does not have.
template <int R>
inline void clear_block() { asm volatile("tilezero %%tmm%c0" ::"i"(R)); }
template <int R>
inline void load_block(const void* from, int64_t step = 64) {  // bytes from row to row
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(step), "i"(R) : "memory");
}
template <int R>
inline void store_block(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{64}), "i"(R) : "memory");
}
template <int Sum, int Left, int Right>
inline void add_product() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right)); }

// `f.operator()<0>()`, ..., `<N - 1>`.
template <int N, class F>
[[gnu::always_inline]] inline void each(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (f.template operator()<I>(), ...);
  }(std::make_integer_sequence<int, N>());
}

// Sums of R blocks of x, `of_x` numbers apart, and T tiles, `of_tile` numbers apart, over some blocks of inputs.
template <int R, int T>
inline void add_blocks(const uint32_t* x, int64_t of_x, int64_t x_block, const uint32_t* weights, int64_t of_tile,
                       int64_t blocks) {
  for (int64_t k = 0; k < blocks; ++k) {
    each<R>([&]<int r>() { load_block<4 + r>(x + r * of_x + k * x_block); });
    each<T>([&]<int t>() {
      load_block<6 + t % 2>(weights + t * of_tile + k * kBlock);
      each<R>([&]<int r>() { add_product<r * T + t, 4 + r, 6 + t % 2>(); });
    });
  }
}

// The size of blocks of rows, or of pixels: as few of them as can be, and as equal.
inline int64_t block_size(int64_t rows) {
  const int64_t blocks = (rows + kUnits - 1) / kUnits;
  return (rows + blocks - 1) / blocks;
}

// `count` words from the `start`-th on of a tile, decoded to whole blocks: weights that are not there are zero.
template <int B>
inline void decode_blocks(const Problem& p, const PairKernel<B>& kernel, int64_t tile, int64_t start, int64_t count,
                          uint32_t* to) {
  const uint32_t* codes = p.codes + (tile * p.words + start) * kRows;
  const int64_t there = std::min(count, p.words - start);
  for (int64_t w = 0; w < there; ++w) {
    fetch_ahead(codes + w * kRows);
    kernel.decode(codes + w * kRows, to + w * kPairs<B> * kRows, 0);
  }
  if (there < count) std::fill(to + there * kPairs<B> * kRows, to + count * kPairs<B> * kRows, 0u);
}

// A block of x, or less of one, and T tiles: the next weights are decoded while the last are multiplied. A product waits
// for the sum that it adds to, longer than decoding a block takes: a single tile leaves the unit idle. Where several blocks
// are decoded at once (3 and 5 bits) two tiles of them take too much of the first cache, and one is faster.
template <int B, int T>
void few_blocks(const Problem& p, const PairKernel<B>& kernel, const uint32_t* x, int64_t tile, BFloat16* y) {
  constexpr int words = kWordsAtOnce<B>, blocks = kBlocksAtOnce<B>, of_tile = blocks * kBlock;
  alignas(64) uint32_t weights[2][T * of_tile];
  alignas(64) float sums[T][kUnits * kRows];
  const int64_t steps = (p.words + words - 1) / words, x_block = p.rows * kUnits;
  const auto decode = [&](int64_t step) {
    for (int t = 0; t < T; ++t) {
      decode_blocks<B>(p, kernel, tile + t, step * words, words, weights[step % 2] + t * of_tile);
    }
  };
  each<T>([&]<int t>() { clear_block<t>(); });
  decode(0);
  for (int64_t step = 0; step < steps; ++step) {
    if (step + 1 < steps) decode(step + 1);
    add_blocks<1, T>(x + step * blocks * x_block, 0, x_block, weights[step % 2], of_tile, blocks);
  }
  each<T>([&]<int t>() { store_block<t>(sums[t]); });
  for (int64_t m = 0; m < p.rows; ++m) {
    for (int t = 0; t < T; ++t) finish(p, tile + t, m, sums[t] + m * kRows, y);
  }
}

// Several blocks of x: some inputs of one or two tiles are decoded and multiplied with all of them.
template <int B>
void many_blocks(const Problem& p, const PairKernel<B>& kernel, const uint32_t* x, int64_t rows, int64_t first,
                 int64_t tiles, uint32_t* weights, float* sums, BFloat16* y) {
  constexpr int words = kDeep<B> * kWordsAtOnce<B>, of_tile = kDeep<B> * kBlocksAtOnce<B> * kBlock;
  const int64_t count = (p.rows + rows - 1) / rows, x_block = rows * kUnits, of_sum = rows * kRows;
  const int64_t of_x = (p.words + kWordsAtOnce<B> - 1) / kWordsAtOnce<B> * kBlocksAtOnce<B> * x_block;
  std::fill(sums, sums + tiles * count * of_sum, 0.0f);
  for (int64_t start = 0; start < p.words; start += words) {
    const int64_t left = std::min<int64_t>(words, p.words - start);
    const int64_t whole = (left + kWordsAtOnce<B> - 1) / kWordsAtOnce<B>, blocks = whole * kBlocksAtOnce<B>;
    for (int64_t t = 0; t < tiles; ++t) {
      decode_blocks<B>(p, kernel, first + t, start, whole * kWordsAtOnce<B>, weights + t * of_tile);
    }
    const auto add = [&]<int R, int T>(int64_t r) {
      const auto sum = [&](int i, int j) { return sums + (j * count + r + i) * of_sum; };
      each<R>([&]<int i>() { each<T>([&]<int j>() { load_block<i * T + j>(sum(i, j)); }); });
      const uint32_t* from = x + r * of_x + start / kWordsAtOnce<B> * kBlocksAtOnce<B> * x_block;
      add_blocks<R, T>(from, of_x, x_block, weights, of_tile, blocks);
      each<R>([&]<int i>() { each<T>([&]<int j>() { store_block<i * T + j>(sum(i, j)); }); });
    };
    for (int64_t r = 0; r < count; r += 2) {
      const bool last = r + 1 == count;
      if (tiles == 2) {
        last ? add.template operator()<1, 2>(r) : add.template operator()<2, 2>(r);
      } else {
        last ? add.template operator()<1, 1>(r) : add.template operator()<2, 1>(r);
      }
    }
  }
  for (int64_t m = 0; m < p.rows; ++m) {  // outputs side by side one after the other: a row of y is a page, or several
    for (int64_t t = 0; t < tiles; ++t) finish(p, first + t, m, sums + t * count * of_sum + m * kRows, y);
  }
}

// Rows `[rows][K]` as `[block of rows][block of inputs][row][pair]`, with zeros behind the last input and the last row.
inline void pack_blocks(const BFloat16* x, int64_t count, int64_t rows, int64_t inputs, int64_t blocks, uint32_t* to) {
  std::fill(to, to + blocks * rows * kUnits, 0u);
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t k = 0; k * 2 * kUnits < inputs; ++k) {
      const int64_t at = k * 2 * kUnits, there = std::min<int64_t>(2 * kUnits, inputs - at);
      std::memcpy(to + (k * rows + m) * kUnits, x + m * inputs + at, 2 * there);
    }
  }
}

template <int B>
void multiply_blocks(const Problem& p, const float* table, int64_t size, const BFloat16* x, BFloat16* y) {
  const PairKernel<B> kernel(table, size);
  const int64_t steps = (p.words + kWordsAtOnce<B> - 1) / kWordsAtOnce<B>, blocks = steps * kBlocksAtOnce<B>;
  const int64_t rows = block_size(p.rows), count = (p.rows + rows - 1) / rows;
  const auto* packed = reinterpret_cast<const uint32_t*>(x);
  const bool own = p.rows == 1 && blocks * 2 * kUnits == p.inputs;  // x is its own block
  const auto room = scratch<uint32_t>(own ? 0 : count * blocks * rows * kUnits);
  if (!own) {
    packed = room.get();
    torch::stable::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        pack_blocks(x + i * rows * p.inputs, std::min(rows, p.rows - i * rows), rows, p.inputs, blocks,
                    room.get() + i * blocks * rows * kUnits);
      }
    });
  }
  const int64_t tiles = (p.outputs + kRows - 1) / kRows;
  if (count == 1) {
    constexpr int together = kBlocksAtOnce<B> == 1 ? 2 : 1;
    return torch::stable::parallel_for(0, (tiles + together - 1) / together, 1, [&](int64_t from, int64_t to) {
      Blocks shapes;
      shapes.shape(int(rows));
      for (int64_t tile = from * together; tile < std::min(to * together, tiles); tile += together) {
        if (tile + together <= tiles) {
          few_blocks<B, together>(p, kernel, packed, tile, y);
        } else {
          few_blocks<B, 1>(p, kernel, packed, tile, y);
        }
      }
    });
  }
  torch::stable::parallel_for(0, (tiles + 1) / 2, 1, [&](int64_t from, int64_t to) {
    Blocks shapes;
    shapes.shape(int(rows));
    const auto weights = scratch<uint32_t>(2 * kDeep<B> * kBlocksAtOnce<B> * kBlock);
    const auto sums = scratch<float>(2 * count * rows * kRows);
    for (int64_t pair = from; pair < to; ++pair) {
      const int64_t first = 2 * pair, here = std::min<int64_t>(2, tiles - first);
      many_blocks<B>(p, kernel, packed, rows, first, here, weights.get(), sums.get(), y);
    }
  });
}

}  // namespace sqs

#endif

namespace sqs {

// `x @ weight.T`, by the unit where there is one.
template <class Kernel, int B, class T>
void product(const Problem& p, const float* table, int64_t size, const T* x, T* y) {
#if defined(SQS_MATRIX_UNIT)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (has_matrix_unit()) return multiply_blocks<B>(p, table, size, x, y);
  }
#endif
  multiply<Kernel, B>(p, table, size, x, y);
}

}  // namespace sqs
