// What the operators look like, for processes in which our Python has not said so: a library of its own, as one that is
// declared twice is an error, and those with the kernels are the same with Python and without.

#include "arguments.h"

STABLE_TORCH_LIBRARY_FRAGMENT(sqs, m) {
  m.def("linear_tiled(Tensor x, Tensor? bias, Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits) -> Tensor");
  m.def("linear_int8_tiled(Tensor x, Tensor? bias, int block, Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits) -> Tensor");
  m.def("embedding_tiled(Tensor indices, ScalarType dtype, Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits) -> Tensor");
  m.def(
      "convolution_tiled(Tensor x, Tensor? bias, int[] stride, int[] padding, int[] dilation, bool transposed, "
      "int[] output_padding, int groups, Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits) -> Tensor");
  m.def("linear_rows(Tensor x, Tensor? bias, Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits) -> Tensor");
  m.def("embedding_rows(Tensor indices, ScalarType dtype, Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits) -> Tensor");
}
