// Which instruction set the kernels run on, chosen once per process.
#pragma once

namespace fastadapter {

enum class Isa { kDefault, kAvx2, kAvx512 };

// The best set that this build and this machine have, capped by ATEN_CPU_CAPABILITY as in PyTorch.
Isa cpu_isa();

}  // namespace fastadapter
