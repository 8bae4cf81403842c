// Convolutions of float32.

#include "convolution.h"

namespace sqs {

void convolve_float32(const Geometry& g, const Weight& w, const float* bias, const float* x, float* y) {
  convolve<Singles>(g, w, bias, x, y);
}

}  // namespace sqs
