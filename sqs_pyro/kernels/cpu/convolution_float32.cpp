// Convolutions of float32, and weights of theirs.

#include "convolution.h"

namespace sqs {

void convolve_float32(const Geometry& g, const Weight& w, const float* bias, const float* x, float* y) {
  convolve<Singles>(g, w, bias, x, y);
}

void decode_float32(const Geometry& g, const Weight& w, float* to) {
  const int64_t of_output = g.taps() * g.of_group();
  const auto tile = scratch<float>(numbers_of_tile<Singles>(w));  // [tap, channel][16 outputs]
  for (int64_t first = 0; first < g.outputs; first += kRows) {
    with_bits(w.bits, [&]<int B>() { decode_tile<Singles, B>(w, first / kRows, g.of_group(), tile.get()); });
    const int64_t outputs = std::min<int64_t>(kRows, g.outputs - first);
    turn_over(tile.get(), of_output, outputs, kRows, to + first * of_output, of_output);
  }
  const auto turned = scratch<float>(g.last ? 0 : of_output);
  for (int64_t n = 0; n < g.outputs; ++n, to += of_output) {
    if (w.scale()) std::transform(to, to + of_output, to, [&](float value) { return value * w.scale()[n]; });
    if (g.last) continue;
    turn_over(to, g.taps(), g.of_group(), g.of_group(), turned.get(), g.taps());
    std::copy(turned.get(), turned.get() + of_output, to);
  }
}

}  // namespace sqs
