// Run a compiled network without Python: ./run DIRECTORY INPUTS.pt OUTPUTS.pt, where INPUTS.pt holds a tuple of tensors
// (torch.save writes it), and OUTPUTS.pt will hold one. Build it with the headers and libraries of the torch package:
//
//   TORCH=$(python -c "import torch; print(torch.__path__[0])")
//   c++ -std=c++20 run.cpp -o run -I$TORCH/include -I$TORCH/include/torch/csrc/api/include -L$TORCH/lib
//       -Wl,--no-as-needed,-rpath,$TORCH/lib -ltorch -ltorch_cpu -lc10 -ldl

#include <dlfcn.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: run DIRECTORY INPUTS.pt OUTPUTS.pt\n";
    return 2;
  }
  const std::filesystem::path directory = arguments[1];
  for (const auto& file : std::filesystem::directory_iterator(directory)) {
    if (file.path().filename().string().rfind("libsqs_", 0) != 0) continue;
    if (!dlopen(file.path().c_str(), RTLD_NOW)) {  // it declares the operators of packed weights
      std::cerr << dlerror() << "\n";
      return 1;
    }
  }
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader network((directory / "model.pt2").string());

  std::ifstream given(arguments[2], std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(given)), std::istreambuf_iterator<char>());
  const c10::IValue tuple = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& value : tuple.toTupleRef().elements()) inputs.push_back(value.toTensor());
  std::vector<c10::IValue> found;
  for (const at::Tensor& tensor : network.run(inputs)) found.emplace_back(tensor);
  const std::vector<char> written = torch::jit::pickle_save(c10::ivalue::Tuple::create(found));
  std::ofstream(arguments[3], std::ios::binary).write(written.data(), std::streamsize(written.size()));
}
