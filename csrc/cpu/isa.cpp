#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace jf {
namespace {

Isa best_isa() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  // These also check that the operating system supports the wide registers (XCR0).
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return avx512_bf16 ? Isa::avx512_bf16 : avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::generic;
#else
  return Isa::generic;
#endif
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* asked = std::getenv("JASPER_FAST_ISA");
  if (asked == nullptr || *asked == '\0') return best;
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    if (std::string(asked) != isa_name(isa)) continue;
    if (isa <= best) return isa;
    throw std::runtime_error(std::string("JASPER_FAST_ISA=") + asked + ": this CPU has " + isa_name(best) +
                             " only; unset the variable or name a lower level");
  }
  throw std::runtime_error(std::string("JASPER_FAST_ISA=") + asked + ": expected generic, avx2, avx512 or avx512_bf16");
}

std::string isa_in_use() { return isa_name(cpu_isa()); }

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace jf

STABLE_TORCH_LIBRARY_FRAGMENT(jasper_fast_cpu, m) { m.def("isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(jasper_fast_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&jf::isa_in_use)); }
