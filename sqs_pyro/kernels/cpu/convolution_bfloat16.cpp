// Convolutions of bfloat16, where there are instructions for it.

#include "convolution.h"

#if defined(__AVX512BF16__)

namespace sqs {

void convolve_bfloat16(const Geometry& g, const Weight& w, const float* bias, const BFloat16* x, BFloat16* y) {
  convolve<Pairs>(g, w, bias, x, y);
}

}  // namespace sqs

#endif
