// Which instruction set this process uses, chosen once at run time.
//
// Every file under csrc/cpu/isa/ is compiled once per level with -DJF_ISA=<level>, and all its symbols are in namespace
// jf::<level>. Files outside isa/ use the baseline instruction set and pick a namespace by cpu_isa().
#pragma once

namespace jf {

enum class Isa { generic, avx2, avx512, avx512_bf16 };

// The best level of this CPU. The environment variable JASPER_FAST_ISA=generic|avx2|avx512|avx512_bf16 can lower it.
// Throws std::runtime_error for an unknown level and for a level that this CPU does not support.
Isa cpu_isa();

const char* isa_name(Isa isa);

}  // namespace jf

// JF_DISPATCH(f)(args...) calls jf::<level>::f for the level in use. Builds for other machines than x86 have only the
// generic level.
#if defined(__x86_64__) || defined(_M_X64)
#define JF_DISPATCH(f)                                               \
  (::jf::cpu_isa() == ::jf::Isa::avx512_bf16 ? &::jf::avx512_bf16::f \
   : ::jf::cpu_isa() == ::jf::Isa::avx512    ? &::jf::avx512::f      \
   : ::jf::cpu_isa() == ::jf::Isa::avx2      ? &::jf::avx2::f        \
                                             : &::jf::generic::f)
#define JF_FOR_EACH_ISA(declare) declare(generic) declare(avx2) declare(avx512) declare(avx512_bf16)
#else
#define JF_DISPATCH(f) (&::jf::generic::f)
#define JF_FOR_EACH_ISA(declare) declare(generic)
#endif
