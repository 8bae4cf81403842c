// Convolutions with packed weights on CPUs, ordinary, grouped and transposed: no columns are written out.
//
// Channels of a pixel stand side by side (channels last); of other images strips are brought into that order, and
// outputs back. A register holds 16 outputs of a pixel, so that a tile of the weight
// (sqs_pyro/kernels/tiled.py: a matrix [outputs, taps x channels], channels in pairs) is multiplied as it is decoded,
// with one input in all lanes. What an output reads is a few runs of numbers that also stand side by side in the
// weight: one for each row of the kernel, or one for each tap. Depthwise, a register holds 16 channels of inputs and
// of outputs. Transposed, outputs of each residue modulo the stride are a convolution of their own.

#pragma once

#include "arguments.h"
#include "blocks.h"
#include "pixels.h"

namespace sqs {

constexpr int64_t kCopied = 512 << 10;   // bytes of x that all tiles read before the next are read
constexpr int64_t kDecoded = 256 << 10;  // bytes of weights that are decoded once for all of x

// ---- weights ----------------------------------------------------------------------------------------------------

// Numbers that a tile's units take; decoding writes whole words.
template <class L>
int64_t numbers_of_tile(const Weight& w) {
  int64_t units = 0;
  with_bits(w.bits, [&]<int B>() { units = w.words * 2 / L::kInputs * kPairs<B>; });
  return units * kRows;
}

// A tile's weights, `[unit][16]`; of an odd number of channels (of a row of the weight) the empty halves are left out.
template <class L, int B>
void decode_tile(const Weight& w, int64_t tile, int64_t channels, typename L::X* to) {
  constexpr int of_word = 2 / L::kInputs * kPairs<B>;
  const auto decode = [&](const auto& decoder) {
    for (int64_t word = 0; word < w.words; ++word) {
      for (int lane = 0; lane < kRows; lane += kLanes) {
        const uint32_t* codes = w.words_data() + (tile * w.words + word) * kRows + lane;
        decoder.decode(codes, to + word * of_word * kRows + lane, lane);
      }
    }
  };
  if (w.tables() == 1) {
    decode(typename L::template Decoder<B>(w.values(), w.size()));
  } else {
    decode(LaneTables<B>(w.values(), w.size(), tile * kRows, w.outputs, w.of_table() / w.inputs));
  }
  if (L::kInputs == 1 && channels % 2) {
    const int64_t taps = w.inputs / (channels + 1);
    for (int64_t tap = 1; tap < taps; ++tap) {
      const auto* from = to + tap * (channels + 1) * kRows;
      std::copy(from, from + channels * kRows, to + tap * channels * kRows);
    }
  }
}

// A depthwise tile's taps as pairs of neighbours in a row of the kernel, the last of a row by itself.
inline void pair_taps(const Geometry&, float*) {}  // float32 is multiplied one by one

inline void pair_taps(const Geometry& g, uint32_t* tile) {
  const int64_t of_row = g.columns.kernel * kRows;
  for (int64_t i = 0; i < g.taps() * kRows; ++i) {
    const uint32_t next = i % of_row + kRows < of_row ? tile[i + kRows] << 16 : 0;
    tile[i] = (tile[i] & 0xffff) | next;
  }
}

inline void put_weight(float value, int64_t, float* unit) { *unit = value; }

inline void put_weight(float value, int64_t half, uint32_t* unit) {
  const uint16_t rounded = BFloat16(value).x;
  std::memcpy(reinterpret_cast<char*>(unit) + 2 * half, &rounded, 2);
}

// All tiles of outputs of a transposed weight, whose rows are inputs, as are its scales; `to` holds zeros.
template <class L>
void transpose_weight(const Geometry& g, const Weight& w, int64_t units_of_tap, int64_t of_tile, typename L::X* to) {
  const int64_t outputs = g.outputs_of_group();
  const auto rows = scratch<float>(numbers_of_tile<Singles>(w));  // [tap, output][16 inputs]
  for (int64_t input = 0; input < g.channels; ++input) {
    if (input % kRows == 0) {
      with_bits(w.bits, [&]<int B>() { decode_tile<Singles, B>(w, input / kRows, outputs, rows.get()); });
    }
    const int64_t first = input / g.of_group() * outputs, within = input % g.of_group();
    const float scale = w.scale() ? w.scale()[input] : 1.0f;
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      const int64_t unit = tap * units_of_tap + within / L::kInputs;
      for (int64_t n = first; n < first + outputs; ++n) {
        const float value = rows[(tap * outputs + n - first) * kRows + input % kRows] * scale;
        put_weight(value, within % L::kInputs, to + n / kRows * of_tile + unit * kRows + n % kRows);
      }
    }
  }
}

// ---- all of it --------------------------------------------------------------------------------------------------

// Outputs that are computed together: of one group, in few tiles; or depthwise all of them.
struct Range {
  int64_t first, last, tile, wide;
};

inline std::vector<Range> ranges_of(const Geometry& g) {
  if (g.depthwise()) return {{0, g.outputs, 0, (g.outputs + kRows - 1) / kRows}};
  std::vector<Range> ranges;
  const int64_t together = g.outputs_of_group();
  for (int64_t group = 0; group < g.outputs; group += together) {
    const int64_t end = group + together, first = group / kRows, tiles = (end - 1) / kRows - first + 1;
    const int64_t parts = (tiles + kWide - 1) / kWide;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t tile = first + tiles * i / parts, behind = first + tiles * (i + 1) / parts;
      ranges.push_back({std::max(group, tile * kRows), std::min(end, behind * kRows), tile, behind - tile});
    }
  }
  return ranges;
}

// Rows of outputs of an image, or some of the only one.
struct Strip {
  int64_t image, row, rows, column, columns;
};

// Whether numbers of x are copied: with zeros around them, or because an odd number of channels is no pairs.
template <class L>
bool copied(const Geometry& g) {
  return g.padded() || g.depthwise() || g.of_group() % L::kInputs;
}

template <class L, class T>
struct Convolution {
  using X = typename L::X;
  const Geometry& g;
  const Weight& w;
  bool flat;  // strips are of the only row
  const T* x;
  T* y;
  const float *scales, *biases;  // of all tiles
  int64_t channels = (g.of_group() + L::kInputs - 1) / L::kInputs;  // of a group, in numbers of the copy
  int64_t tiles = (g.outputs + kRows - 1) / kRows;
  int64_t of_pixel = g.depthwise() ? tiles * kRows : channels * g.groups;
  bool copies = copied<L>(g);
  int64_t pitch = !copies ? g.columns.size  // pixels from row to row
                          : std::max(g.columns.reach(g.columns.outputs(0)), g.columns.before() + g.columns.size);
  int64_t of_tile = g.transposed() ? g.taps() * channels * kRows : numbers_of_tile<L>(w);
  std::vector<Range> ranges = ranges_of(g);
  std::vector<std::vector<Run>> runs{};  // of each residue
  int64_t of_done = (g.depthwise() ? tiles : kWide) * kRows;  // outputs of a pixel that are turned over together

  // Rows of x that a strip reads, of those that there are, and how many zeros stand before them.
  struct Rows {
    int64_t first, count, before;
  };
  Rows rows_of(const Strip& s) const {
    const int64_t first = s.row * g.rows.pace() - g.rows.before(), reach = g.rows.reach(s.rows);
    const int64_t from = std::clamp<int64_t>(first, 0, g.rows.size);
    const int64_t to = std::clamp<int64_t>(first + reach, from, g.rows.size);
    return {from, to - from, std::clamp<int64_t>(from - first, 0, reach)};
  }

  // A row of pixels as the copy has them: groups of an odd number of channels end with half a pair.
  void put_pixels(const T* from, X* to) const {
    const int64_t pixels = g.columns.size;
    if (g.depthwise()) return put_own_pixels(from, pixels, g.channels, to, of_pixel, g.columns.before() > 0);
    if (of_pixel * L::kInputs == g.channels) return put_numbers(from, pixels * g.channels, to);
    if constexpr (L::kInputs == 2) {
      if (g.groups == 1 && channels <= 8) return put_odd_pixels(from, pixels, g.channels, to);
    }
    for (int64_t i = 0; i < pixels * g.groups; ++i) {
      put_numbers(from + i * g.of_group(), g.of_group(), to + i * channels);
    }
  }

  // A strip's numbers, channels last and with zeros around them; `turned` and `copied` have room for them.
  const X* prepare(const Strip& s, T* turned, X* copied) const {
    const Rows rows = rows_of(s);
    const T* from = x + s.image * g.channels * g.size();
    const int64_t first = rows.first * g.columns.size + s.column;
    if (g.last) {
      from += first * g.channels;
    } else {
      const int64_t pixels = flat ? s.columns : rows.count * g.columns.size;
      turn_over(from + first, g.channels, pixels, g.size(), turned, g.channels);
      from = turned;
    }
    if (!copies) return reinterpret_cast<const X*>(from);
    const int64_t before = g.columns.before() * of_pixel, within = g.columns.size * of_pixel, row = pitch * of_pixel;
    std::fill(copied, copied + rows.before * row, X(0));
    for (int64_t i = 0; i < rows.count; ++i) {
      X* to = copied + (rows.before + i) * row;
      std::fill(to, to + before, X(0));
      put_pixels(from + i * g.columns.size * g.channels, to + before);
      std::fill(to + before + within, to + row, X(0));
    }
    std::fill(copied + (rows.before + rows.count) * row, copied + g.rows.reach(s.rows) * row, X(0));
    return copied;
  }

  // What an output of a residue reads of the strip, of the first group, and the weights that belong to it.
  std::vector<Run> runs_of(int64_t row_residue, int64_t column_residue) const {
    std::vector<Run> runs;
    for (const auto& row : g.rows.reads(row_residue)) {
      for (const auto& column : g.columns.reads(column_residue)) {
        const int64_t tap = row.tap * g.columns.kernel + column.tap;
        const Run run{(row.at * pitch + column.at) * of_pixel, tap * channels * kRows, channels};
        Run* last = runs.empty() ? nullptr : &runs.back();
        if (g.depthwise()) {
          const bool next = last && last->at + of_pixel == run.at && last->weight + kRows == run.weight;
          if (next && last->length < L::kInputs && column.tap > 0) ++last->length;
          else runs.push_back(run);
        } else if (last && last->at + last->length == run.at && last->weight + last->length * kRows == run.weight) {
          last->length += run.length;
        } else {
          runs.push_back(run);
        }
      }
    }
    return runs;
  }

  // What a thread needs to work in.
  struct Room {
    int64_t of_turned, of_copied;  // of an image
    decltype(scratch<T>(0)) turned, done;
    decltype(scratch<X>(0)) copied, decoded;
#if defined(SQS_MATRIX_UNIT)
    Blocks registers{};
#endif
  };

  // Outputs of a range from a strip; `at` is where the strip's first output goes, and pixels are `of_output` apart.
  void outputs(const Strip& s, const Range& r, const X* weights, const X* from, Room& room, T* at,
               int64_t of_output) const {
    for (int64_t row_residue = 0; row_residue < g.rows.step(); ++row_residue) {
      for (int64_t column_residue = 0; column_residue < g.columns.step(); ++column_residue) {
        const auto& reads = runs[row_residue * g.columns.step() + column_residue];
        const int64_t rows = std::min(s.rows, g.rows.outputs(row_residue) - s.row);
        const int64_t columns = std::min(s.columns, g.columns.outputs(column_residue) - s.column);
        const int64_t x_step = g.columns.pace() * of_pixel, y_step = g.columns.step() * of_output;
        Task<X, T> task{reads, weights, of_tile, scales + r.tile * kRows, biases + r.tile * kRows, {}, x_step, y_step};
        const bool unit = columns > 0 && takes_unit(reads, columns, room);
        for (int64_t row = 0; row < rows; ++row) {
          const X* x_row = from + row * g.rows.pace() * pitch * of_pixel;
          T* y_row = at + ((row * g.rows.step() + row_residue) * g.columns.out + column_residue) * of_output;
          if (g.depthwise()) {
            channels_of_row(task, columns, x_row, y_row);
          } else {
            outputs_of_row(task, r, columns, x_row, unit, y_row);
          }
        }
      }
    }
  }

  static uint32_t wanted(int64_t tile, const Range& r) {
    const int64_t first = std::max<int64_t>(0, r.first - tile * kRows);
    const int64_t end = std::min<int64_t>(kRows, r.last - tile * kRows);
    return (1u << end) - (1u << first);
  }

  // Whether the matrix unit does rows of so many outputs; its registers then have their shapes.
  bool takes_unit([[maybe_unused]] const std::vector<Run>& reads, [[maybe_unused]] int64_t columns,
                  [[maybe_unused]] Room& room) const {
#if defined(SQS_MATRIX_UNIT)
    if constexpr (std::is_same_v<L, Pairs>) {
      const auto pairs = g.depthwise() || !has_matrix_unit() ? std::nullopt : pairs_left(reads);
      if (pairs) room.registers.shape(int(block_size(columns)), kRows, *pairs);
      return pairs.has_value();
    }
#endif
    return false;
  }

  void outputs_of_row(Task<X, T>& task, const Range& r, int64_t columns, const X* from, [[maybe_unused]] bool unit,
                      T* to) const {
    for (int64_t t = 0; t < r.wide; ++t) task.wanted[t] = wanted(r.tile + t, r);
#if defined(SQS_MATRIX_UNIT)
    if constexpr (std::is_same_v<L, Pairs>) {
      if (unit) return unit_outputs_of_row(task, r, columns, from, to);
    }
#endif
    const auto blocks = [&]<int W>() {
      in_blocks<pixels_of(registers_at_once(W))>(columns, [&]<int M>(int64_t first) {
        block<L, M, W>(task, from + first * task.x_step, to + first * task.y_step);
      });
    };
    if (r.wide == 3) return blocks.template operator()<3>();
    if (r.wide == 2) return blocks.template operator()<2>();
    blocks.template operator()<1>();
  }

#if defined(SQS_MATRIX_UNIT)
  void unit_outputs_of_row(const Task<X, T>& task, const Range& r, int64_t columns, const X* from, T* to) const {
    const int64_t size = block_size(columns);
    for (int64_t begin = 0; begin < columns; begin += size) {
      const int64_t first = std::min(begin, columns - size);  // the last block ends with the row
      const X* x_first = from + first * task.x_step;
      T* y_first = to + first * task.y_step;
      each<kWide>([&]<int w>() {
        if (r.wide == w + 1) unit_block<w + 1>(task, size, x_first, y_first);
      });
    }
  }
#endif

  void channels_of_row(Task<X, T> task, int64_t columns, const X* from, T* to) const {
    for (int64_t tile = 0; tile < tiles; ++tile, from += kRows, to += kRows) {
      task.wanted[0] = wanted(tile, ranges[0]);
      in_blocks<pixels_of(1)>(columns, [&]<int M>(int64_t first) {
        depthwise<L, M>(task, from + first * task.x_step, to + first * task.y_step);
      });
      task.weights += of_tile, task.scales += kRows, task.biases += kRows;
    }
  }

  // How the work is cut: images of a chunk, strips of an image, parts of the ranges of outputs.
  struct Cut {
    int64_t length, at_once, strips, parts;
    int64_t longest() const { return (length + strips - 1) / strips; }
  };

  Cut cut() const {
    const int64_t threads = torch::stable::get_num_threads();
    Cut c{flat ? g.columns.out : g.rows.outputs(0), 1, 1, 1};
    const int64_t numbers = (flat ? g.columns.size : g.rows.reach(c.length) * pitch) * of_pixel;
    const int64_t bytes = std::max<int64_t>(1, numbers * int64_t(sizeof(X)));
    c.strips = std::clamp<int64_t>((bytes + kCopied - 1) / kCopied, 1, c.length);
    c.at_once = std::clamp<int64_t>(kCopied / bytes, 1, (g.images + threads - 1) / threads);
    // Too few for the threads: these share ranges, and with few of them strips are shorter.
    const int64_t tasks = (g.images + c.at_once - 1) / c.at_once * c.strips;
    c.parts = std::clamp<int64_t>((threads + tasks - 1) / tasks, 1, int64_t(ranges.size()));
    if (tasks * c.parts < threads) {
      c.strips = std::min(c.length, (threads * c.strips + tasks * c.parts - 1) / (tasks * c.parts));
    }
    return c;
  }

  // As much of it as a cut needs.
  Room room(const Cut& c) const {
    const int64_t rows = flat ? 1 : c.longest(), reach = g.rows.reach(rows);
    const int64_t pixels = flat ? c.longest() : std::min(reach, g.rows.size) * g.columns.size;
    const int64_t of_turned = g.last ? 0 : pixels * g.channels;
    const int64_t of_copied = copies ? reach * pitch * of_pixel : 0;
    const int64_t outputs = rows * g.rows.step() * (flat ? c.longest() : g.columns.out);
    return {of_turned, of_copied, scratch<T>(c.at_once * of_turned), scratch<T>(g.last ? 0 : outputs * of_done),
            scratch<X>(c.at_once * of_copied), scratch<X>(g.transposed() ? 0 : kWide * of_tile)};
  }

  // A range's outputs of a strip, where they belong.
  void finish(const Strip& s, const Range& r, const X* weights, const X* prepared, Room& room) const {
    const int64_t row = s.row * g.rows.step(), rows = std::min(s.rows * g.rows.step(), g.rows.out - row);
    const int64_t first = row * g.columns.out + s.column, pixels = flat ? s.columns : rows * g.columns.out;
    T* image = y + s.image * g.outputs * g.pixels();
    if (g.last) return outputs(s, r, weights, prepared, room, image + first * g.outputs + r.tile * kRows, g.outputs);
    outputs(s, r, weights, prepared, room, room.done.get(), of_done);
    const T* done = room.done.get() + r.first - r.tile * kRows;
    turn_over(done, pixels, r.last - r.first, of_done, image + r.first * g.pixels() + first, g.pixels());
  }

  // Ranges `from` to `to` of strips that differ in nothing but their image; `ready` are weights of all tiles, or null.
  void strips(const std::vector<Strip>& some, int64_t from, int64_t to, const X* ready, Room& room) const {
    std::vector<const X*> prepared;
    for (const Strip& s : some) {
      const int64_t i = int64_t(prepared.size());
      X* copied = room.copied.get() + i * room.of_copied;
      prepared.push_back(prepare(s, room.turned.get() + i * room.of_turned, copied));
    }
    const Range* decoded = nullptr;
    for (const Range* r = &ranges[from]; r != ranges.data() + to; ++r) {
      if (!ready && !(decoded && decoded->tile == r->tile && decoded->wide == r->wide)) {
        decode(r->tile, r->wide, room.decoded.get());
        decoded = r;
      }
      const X* weights = ready ? ready + r->tile * of_tile : room.decoded.get();
      for (size_t i = 0; i < some.size(); ++i) {
        const int64_t group = g.depthwise() ? 0 : r->first / g.outputs_of_group();
        finish(some[i], *r, weights, prepared[i] + group * channels, room);
      }
    }
  }

  void decode(int64_t tile, int64_t wide, X* to) const {
    with_bits(w.bits, [&]<int B>() {
      for (int64_t t = 0; t < wide; ++t) {
        decode_tile<L, B>(w, tile + t, g.of_group(), to + t * of_tile);
        if (g.depthwise()) pair_taps(g, to + t * of_tile);
      }
    });
  }

  void operator()() {
    for (int64_t row = 0; row < g.rows.step(); ++row) {
      for (int64_t column = 0; column < g.columns.step(); ++column) runs.push_back(runs_of(row, column));
    }
    const bool small = tiles * of_tile * int64_t(sizeof(X)) <= kDecoded;
    const auto all = scratch<X>(small || g.depthwise() || g.transposed() ? tiles * of_tile : 0);
    const X* ready = all.get();
    if (g.transposed()) {
      std::fill(all.get(), all.get() + tiles * of_tile, X(0));
      transpose_weight<L>(g, w, channels, of_tile, all.get());
    } else if (small || g.depthwise()) {
      decode(0, tiles, all.get());
    } else {
      ready = nullptr;
    }
    const Cut c = cut();
    const int64_t chunks = (g.images + c.at_once - 1) / c.at_once, count = int64_t(ranges.size());
    torch::stable::parallel_for(0, chunks * c.strips * c.parts, 1, [&](int64_t from, int64_t to) {
      Room room = this->room(c);
      for (int64_t task = from; task < to; ++task) {
        const int64_t chunk = task / c.parts / c.strips, strip = task / c.parts % c.strips, part = task % c.parts;
        const int64_t start = c.length * strip / c.strips, length = c.length * (strip + 1) / c.strips - start;
        std::vector<Strip> some;
        for (int64_t image = chunk * c.at_once; image < std::min(g.images, (chunk + 1) * c.at_once); ++image) {
          const Strip rows{image, start, length, 0, g.columns.outputs(0)}, columns{image, 0, 1, start, length};
          some.push_back(flat ? columns : rows);
        }
        strips(some, count * part / c.parts, count * (part + 1) / c.parts, ready, room);
      }
    });
  }
};

// ---- entry ------------------------------------------------------------------------------------------------------

// A convolution of images of one pixel is a product of matrices.
template <class L, class T>
void multiply_pixels(const Geometry& g, const Weight& w, const float* bias, const T* x, T* y) {
  with_bits(w.bits, [&]<int B>() {
    const Problem p{w.words_data(), w.words, g.images, g.channels, g.outputs, bias, w.scale()};
    product<typename L::template Decoder<B>, B>(p, w.values(), w.size(), x, y);
  });
}

template <class L, class T>
void convolve(const Geometry& g, const Weight& w, const float* bias, const T* x, T* y) {
  if (g.pointwise() && g.pixels() == 1 && g.groups == 1 && w.tables() == 1) {
    return multiply_pixels<L>(g, w, bias, x, y);
  }
  const int64_t tiles = (g.outputs + kRows - 1) / kRows;
  const auto scales = scratch<float>(tiles * kRows), biases = scratch<float>(tiles * kRows);
  for (int64_t n = 0; n < tiles * kRows; ++n) {
    scales[n] = w.scale() && !g.transposed() && n < g.outputs ? w.scale()[n] : 1.0f;
    biases[n] = bias && n < g.outputs ? bias[n] : 0.0f;
  }
  const bool flat = g.pointwise() && !copied<L>(g);
  const Geometry used = flat ? g.flat() : g;
  Convolution<L, T>{used, w, flat, x, y, scales.get(), biases.get()}();
}

// What follows is most of the work of a compiler: each stands in a file of its own, compiled beside the others.
void convolve_float32(const Geometry& g, const Weight& w, const float* bias, const float* x, float* y);
// The weight of an ordinary convolution, in the order of x: `[outputs][taps][channels]` or `[outputs][channels][taps]`.
void decode_float32(const Geometry& g, const Weight& w, float* to);
#if defined(__AVX512BF16__)
void convolve_bfloat16(const Geometry& g, const Weight& w, const float* bias, const BFloat16* x, BFloat16* y);
#endif

}  // namespace sqs
