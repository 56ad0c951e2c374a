#include "dispatch.h"

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <string>

#include <torch/csrc/stable/library.h>

namespace fastadapter {
namespace {

Isa detect() {
#ifdef FASTADAPTER_X86
  Isa best = Isa::kDefault;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = Isa::kAvx2;  // every CPU with AVX2 has F16C
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
  const char* requested = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string cap = requested ? requested : "";
  if (cap == "default") return Isa::kDefault;
  if (cap == "avx2" && best == Isa::kAvx512) return Isa::kAvx2;
  return best;
#else
  return Isa::kDefault;
#endif
}

std::string cpu_capability() {
  switch (cpu_isa()) {
    case Isa::kAvx512:
      return "AVX512";
    case Isa::kAvx2:
      return "AVX2";
    default:
      return "DEFAULT";
  }
}

std::string cpu_vendor() {
#ifdef FASTADAPTER_X86
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "";
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastadapter, m) {
  m.def("cpu_capability() -> str");
  m.def("cpu_vendor() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastadapter, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("cpu_vendor", TORCH_BOX(&cpu_vendor));
}

}  // namespace fastadapter

// Lets `import fastadapter._C` load the library; the operators are registered by static initialisers.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
