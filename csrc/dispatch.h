// Which instruction set the kernels run on, chosen once per process.
#pragma once

namespace fastadapter {

enum class Isa { kDefault, kAvx2, kAvx512 };

// The best set that this build and this machine have, capped by ATEN_CPU_CAPABILITY as in PyTorch.
Isa cpu_isa();

// The object `name` that every isa_* namespace has, of the set that is used.
#ifdef FASTADAPTER_X86
#define FASTADAPTER_FOR_ISA(name)               \
  (cpu_isa() == Isa::kAvx512 ? isa_avx512::name \
   : cpu_isa() == Isa::kAvx2 ? isa_avx2::name   \
                             : isa_default::name)
#else
#define FASTADAPTER_FOR_ISA(name) (isa_default::name)
#endif

}  // namespace fastadapter
