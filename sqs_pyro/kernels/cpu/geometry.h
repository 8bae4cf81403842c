// What a convolution reads and writes, in one or two dimensions of space.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sqs {

// One dimension of space.
struct Axis {
  int64_t size, kernel, stride, padding, dilation, out;
  bool transposed;

  struct Read {  // of the first output of a residue: a tap, and where it is with `before` zeros put before x
    int64_t tap, at;
  };

  int64_t step() const { return transposed ? stride : 1; }   // between outputs of a residue
  int64_t pace() const { return transposed ? 1 : stride; }  // between what neighbours of them read
  int64_t outputs(int64_t residue) const { return residue < out ? (out - residue - 1) / step() + 1 : 0; }
  int64_t before() const {
    return transposed ? std::max<int64_t>(0, (dilation * (kernel - 1) - padding + stride - 1) / stride) : padding;
  }
  // Numbers with zeros before and behind that `count` outputs of a residue may read.
  int64_t reach(int64_t count) const {
    return transposed ? count + before() + padding / stride + 1 : (count - 1) * stride + dilation * (kernel - 1) + 1;
  }

  std::vector<Read> reads(int64_t residue) const {
    std::vector<Read> found;
    for (int64_t tap = 0; tap < kernel; ++tap) {
      const int64_t place = transposed ? residue + padding - tap * dilation : tap * dilation;
      if (transposed && place % stride) continue;
      found.push_back({tap, transposed ? place / stride + before() : place});
    }
    return found;
  }
};

struct Geometry {
  int64_t images, channels, outputs, groups;
  Axis rows, columns;
  bool last;  // channels are, of x and of the outputs

  int64_t of_group() const { return channels / groups; }
  int64_t outputs_of_group() const { return outputs / groups; }
  int64_t taps() const { return rows.kernel * columns.kernel; }
  int64_t size() const { return rows.size * columns.size; }
  int64_t pixels() const { return rows.out * columns.out; }
  bool transposed() const { return rows.transposed; }
  bool depthwise() const { return of_group() == 1 && outputs_of_group() == 1; }
  bool padded() const { return rows.padding + columns.padding > 0 || transposed(); }
  // Whether an output reads the one pixel that stands where it does.
  bool pointwise() const { return taps() == 1 && rows.stride * columns.stride == 1 && !padded(); }

  // The same with all pixels in one row; channels last, those of all images.
  Geometry flat() const {
    Geometry g = *this;
    g.images = last ? 1 : images;
    g.rows.size = g.rows.out = 1, g.columns.size = g.columns.out = pixels() * (last ? images : 1);
    return g;
  }
};

// Numbers that stand side by side in x, and the weights of an output that they are multiplied with.
struct Run {
  int64_t at, weight, length;
};

}  // namespace sqs
