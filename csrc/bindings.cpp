// The Python module fusedkv_ext._C. Importing it loads the shared object, which registers the CUDA
// implementations of the ops (ops/registration.cpp); the module itself only says how it was built.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.attr("version") = FUSEDKV_VERSION;
  m.attr("torch_version") = FUSEDKV_TORCH_VERSION;
  m.attr("architectures") = FUSEDKV_ARCHITECTURES;
}
