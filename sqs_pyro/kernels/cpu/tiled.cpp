// Matrix products with packed weights on CPUs, and rows of them (sqs_pyro/kernels/tiled.py writes the layout).
//
// Compiled on first use for the machine at hand (sqs_pyro/kernels/native.py). Only PyTorch's stable C interface is used.

#include "operators.h"
#include "products.h"

namespace sqs {

// ---- operators --------------------------------------------------------------------------------------------------

Tensor linear_tiled(Tensor x, std::optional<Tensor> bias, Tensor codes, Tensor table, std::optional<Tensor> scales,
                    std::vector<int64_t> shape, int64_t bits) {
  const Weight weight(Layout::kTiled, codes, table, scales, shape, bits);
  STD_TORCH_CHECK(weight.tables() == 1, "a product with tiled codes takes one table, not ", weight.tables());
  return linear(weight, shape, x, bias, []<class Kernel, int B, class T>(
      const Weight& w, const float* bias, int64_t rows, const T* x, T* y) {
    const Problem p{w.words_data(), w.words, rows, w.inputs, w.outputs, bias, w.scale()};
    multiply<Kernel, B>(p, w.values(), w.size(), x, y);
  });
}

Tensor embedding_tiled(Tensor indices, ScalarType dtype, Tensor codes, Tensor table, std::optional<Tensor> scales,
                       std::vector<int64_t> shape, int64_t bits) {
  return embedding(Weight(Layout::kTiled, codes, table, scales, shape, bits), shape, indices, dtype);
}

}  // namespace sqs

#if defined(SQS_STANDALONE)  // without our Python nobody else has said what the operators look like
STABLE_TORCH_LIBRARY_FRAGMENT(sqs, m) {
  m.def("linear_tiled(Tensor x, Tensor? bias, Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits) -> Tensor");
  m.def("embedding_tiled(Tensor indices, ScalarType dtype, Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(sqs, CPU, m) {
  m.impl("linear_tiled", TORCH_BOX(&sqs::linear_tiled));
  m.impl("embedding_tiled", TORCH_BOX(&sqs::embedding_tiled));
}
