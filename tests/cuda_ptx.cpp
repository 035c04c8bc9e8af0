// For tests/test_cuda_ptx.py: the probe's kernels on the host twins of the PTX instructions, and kernels that each make
// one mistake. With JF_MAIN this is a program that runs one of those kernels, for the sanitizers.
#ifdef JF_MAIN
#include "ptx.cuh"
#else
#include "probe.cuh"
#endif

#include <algorithm>
#include <string>
#include <vector>

using namespace jf;

namespace {

bool broken;  // whether the kernel makes its mistake
float* out;    // 128 floats
alignas(64) float source[4096];

uint32_t base() { return ptx::shared_address(ptx::arena()); }
int thread() { return static_cast<int>(threadIdx.x); }
float element(int cell) {
  float x;
  memcpy(&x, ptx::arena() + 16 * cell, 4);
  return x;
}

constexpr uint32_t kA = 0, kB = 2048, kImage = 4096;  // a, b: 64 x 16 each, K-major

uint64_t left(uint32_t more = 0) { return ptx::wgmma_operand(base() + kA + more, 1024, 128); }
uint64_t right(uint32_t more = 0) { return ptx::wgmma_operand(base() + kB + more, 1024, 128); }
void product(float (&d)[32], uint64_t a, uint64_t b, bool accumulate = true) {
  ptx::wgmma<__half, 64, false, false>(d, a, b, accumulate);
}
void zeros(bool fence = true) {
  for (int i = thread(); i < static_cast<int>(kImage) / 16; i += 128) ptx::store_shared(base() + 16 * i, uint4{});
  if (fence) ptx::fence_async_proxy();
  __syncthreads();
}

// Runs a matrix product of zeros with a kernel's mistake in or around it.
struct Steps {
  bool fence = true, commit = true, wait = true;
};
void around(const Steps& steps, const std::function<void(float (&)[32])>& middle, uint64_t a, uint64_t b, bool skip = false) {
  float d[32] = {};
  if (steps.fence) ptx::wgmma_fence();
  if (!skip) product(d, a, b);
  if (steps.commit) ptx::wgmma_commit();
  middle(d);
  if (steps.wait) ptx::wgmma_wait<0>();
  for (const float x : d) out[thread()] += x;
}
void nothing(float (&)[32]) {}

struct Fault {
  const char* name;
  int grid, block, shared;
  std::function<void()> kernel;
};

// Mistakes that only ThreadSanitizer finds, because the results are right in the order in which the emulation runs
// threads.
std::vector<Fault> races() {
  return {
      {"race store", 1, 64, 512,
       [] {
         uint32_t r[4];
         if (thread() < 32) ptx::store_shared(base() + 16 * thread(), uint4{});
         if (!broken) __syncthreads();
         if (thread() >= 32) ptx::ldmatrix(r, base() + 16 * (thread() - 32));
       }},
      {"race copy", 1, 64, 1024,
       [] {
         ptx::copy_async(base() + 16 * (thread() ^ 32), source, 16);
         ptx::copy_commit();
         ptx::copy_wait<0>();
         if (!broken) __syncthreads();
         if (thread() >= 32) out[thread()] = element(thread());
       }},
      {"race barrier", 1, 64, 512,
       [] {
         if (thread() < 32) {
           if (broken) ptx::barrier_arrive(1, 64);
           ptx::store_shared(base() + 16 * thread(), uint4{});
           if (!broken) ptx::barrier_arrive(1, 64);
         } else {
           ptx::barrier_sync(1, 64);
           out[thread()] = element(thread() - 32);
         }
       }},
      {"race release", 1, 64, 640,
       [] {
         const uint32_t full = base() + 512, empty = full + 8;
         if (thread() == 0) ptx::mbarrier_init(full, 1), ptx::mbarrier_init(empty, 32), ptx::fence_mbarrier_init();
         __syncthreads();
         for (uint32_t step = 0; step < 3; ++step) {
           if (thread() == 0) {
             ptx::mbarrier_wait(empty, step % 2 ^ 1);
             ptx::mbarrier_arrive_expect(full, 512), ptx::copy_bulk(base(), source, 512, full);
           } else if (thread() >= 32) {
             ptx::mbarrier_wait(full, step % 2);
             if (broken) ptx::mbarrier_arrive(empty);
             out[thread()] = element(thread() - 32);
             if (!broken) ptx::mbarrier_arrive(empty);
           }
         }
       }},
      {"race full", 1, 64, 640,
       [] {
         const uint32_t full = base() + 512;
         if (thread() == 0) ptx::mbarrier_init(full, 32);
         __syncthreads();
         if (thread() < 32) {
           if (broken) ptx::mbarrier_arrive(full);
           ptx::store_shared(base() + 16 * thread(), uint4{});
           if (!broken) ptx::mbarrier_arrive(full);
         } else {
           ptx::mbarrier_wait(full, 0);
           out[thread()] = element(thread() - 32);
         }
       }},
      {"race wgmma", 1, 160, kImage + 64,
       [] {
         const uint32_t full = base() + kImage, empty = full + 8;
         if (thread() == 0) ptx::mbarrier_init(full, 1), ptx::mbarrier_init(empty, 128), ptx::fence_mbarrier_init();
         __syncthreads();
         float d[32] = {};
         for (uint32_t step = 0; step < 3; ++step) {
           if (thread() == 128) {
             ptx::mbarrier_wait(empty, step % 2 ^ 1);
             ptx::mbarrier_arrive_expect(full, kImage), ptx::copy_bulk(base(), source, kImage, full);
           } else if (thread() < 128) {
             ptx::mbarrier_wait(full, step % 2);
             ptx::wgmma_fence();
             product(d, left(), right());
             ptx::wgmma_commit();
             if (broken) ptx::mbarrier_arrive(empty);
             ptx::wgmma_wait<0>();
             if (!broken) ptx::mbarrier_arrive(empty);
           }
         }
       }},
      {"race counter", 2, 32, 0,
       [] {
         static int counter, value;
         if (thread()) return;
         if (blockIdx.x == 0) {
           if (broken) ptx::add_release(&counter, 1);
           value = 1;
           if (!broken) ptx::add_release(&counter, 1);
         } else {
           while (ptx::load_acquire(&counter) == 0) {}
           out[0] = static_cast<float>(value);
         }
       }},
  };
}

const std::vector<Fault>& faults() {
  static const std::vector<Fault> all = {
      {"copy_async wait", 1, 32, 512,
       [] {
         ptx::copy_async(base() + 16 * thread(), source + 4 * thread(), 16);
         ptx::copy_commit();
         if (!broken) ptx::copy_wait<0>();
         out[thread()] = element(thread());
       }},
      {"copy_async commit", 1, 32, 512,
       [] {
         ptx::copy_async(base() + 16 * thread(), source + 4 * thread(), 16);
         if (!broken) ptx::copy_commit();
         ptx::copy_wait<0>();
         out[thread()] = element(thread());
       }},
      {"copy_async group", 1, 32, 512,
       [] {
         ptx::copy_async(base() + 16 * thread(), source + 4 * thread(), 16);
         ptx::copy_commit();
         if (broken)
           ptx::copy_wait<1>();
         else
           ptx::copy_wait<0>();
         out[thread()] = element(thread());
       }},
      {"copy_async source aligned", 1, 32, 512, [] { ptx::copy_async(base(), source + broken, 16); }},
      {"copy_async target aligned", 1, 32, 512, [] { ptx::copy_async(base() + 8 * broken, source, 16); }},
      {"copy_async target bounds", 1, 32, 512, [] { ptx::copy_async(base() + 496 + 16 * broken, source, 16); }},
      {"copy_async source bounds", 1, 32, 512,
       [] {
         emulated_memory(source, 256);
         ptx::copy_async(base(), source + 60 + 4 * broken, 16);
         ptx::copy_async(base(), source + 64, 0);  // reads nothing
       }},
      {"store bounds", 1, 32, 512, [] { ptx::store_shared(base() - 16 * broken, uint4{}); }},
      {"plain store bounds", 1, 32, 512, [] { ptx::arena()[511 + broken] = 1; }},
      {"shared address", 1, 32, 512, [] { ptx::shared_address(broken ? static_cast<void*>(source) : ptx::arena()); }},
      {"ldmatrix bounds", 1, 32, 512,
       [] {
         uint32_t r[4];
         ptx::ldmatrix(r, base() + 16 * (thread() + (broken && thread() == 31)));
       }},
      {"ldmatrix aligned", 1, 32, 512,
       [] {
         uint32_t r[4];
         ptx::ldmatrix(r, base() + (broken ? 2 : 16) * (thread() % 8));
       }},
      {"lanes apart", 1, 32, 512,
       [] {
         uint32_t r[4];
         if (broken && thread() > 3)
           ptx::shuffle_xor(1.f, 1);
         else
           ptx::ldmatrix(r, base());
       }},
      {"lane ended", 1, 32, 0,
       [] {
         if (broken && thread() == 7) return;
         ptx::shuffle_xor(1.f, 1);
       }},
      {"barrier threads", 1, 64, 0, [] { ptx::barrier_sync(3, broken && thread() > 31 ? 32 : 64); }},
      {"barrier multiple", 1, 64, 0, [] { ptx::barrier_sync(3, 64 - broken); }},
      {"barrier id", 1, 64, 0, [] { ptx::barrier_sync(broken ? 16 : 15, 64); }},
      {"barrier twice", 1, 64, 0,
       [] {
         if (thread() < 32) {
           ptx::barrier_arrive(3, 64);
           if (broken) ptx::barrier_arrive(3, 64);
         } else {
           ptx::barrier_sync(3, 64);
         }
       }},
      {"barrier lanes", 1, 64, 0, [] { ptx::barrier_arrive(broken && thread() == 40 ? 4 : 3, 64); }},
      {"barrier deadlock", 1, 64, 0, [] { ptx::barrier_sync(thread() < 32 || !broken ? 1 : 2, 64); }},
      {"syncthreads apart", 1, 64, 0,
       [] {
         if (thread() < 32 || !broken)
           __syncthreads();
         else
           ptx::barrier_sync(1, 64);
       }},
      {"mbarrier deadlock", 1, 64, 64,
       [] {
         if (thread() == 0) ptx::mbarrier_init(base(), 64 + broken), ptx::fence_mbarrier_init();
         __syncthreads();
         ptx::mbarrier_arrive(base());
         ptx::mbarrier_wait(base(), 0);
       }},
      {"mbarrier bytes", 1, 32, 128,
       [] {
         if (thread() == 0) ptx::mbarrier_init(base(), 1), ptx::fence_mbarrier_init();
         __syncthreads();
         if (thread() == 0) {
           ptx::mbarrier_arrive_expect(base(), broken ? 80 : 64);
           ptx::copy_bulk(base() + 64, source, 64, base());
         }
         ptx::mbarrier_wait(base(), 0);
       }},
      {"mbarrier arrivals", 1, 64, 128,
       [] {
         if (thread() == 0) ptx::mbarrier_init(base(), 1), ptx::fence_mbarrier_init();
         __syncthreads();
         if (thread() == 0) ptx::mbarrier_arrive_expect(base(), 64);
         if (thread() == 0 && broken) ptx::mbarrier_arrive(base());
         if (thread() == 0) ptx::copy_bulk(base() + 64, source, 64, base());
         ptx::mbarrier_wait(base(), 0);
       }},
      {"mbarrier missing", 1, 32, 64,
       [] {
         if (thread() == 0) ptx::mbarrier_init(base(), 32);
         __syncthreads();
         ptx::mbarrier_arrive(base() + 8 * broken);
       }},
      {"mbarrier twice", 1, 32, 64, [] { for (int i = 0; i <= broken && thread() == 0; ++i) ptx::mbarrier_init(base(), 32); }},
      {"mbarrier overwritten", 1, 32, 64,
       [] {
         if (thread() == 0) ptx::mbarrier_init(base() + 8, 32);
         __syncthreads();
         ptx::store_shared(base() + (broken ? 0 : 16), uint4{});
       }},
      {"mbarrier fence", 1, 32, 128,
       [] {
         if (thread() == 0) ptx::mbarrier_init(base(), 1);
         if (!broken) ptx::fence_mbarrier_init();
         __syncthreads();
         if (thread() == 0) ptx::mbarrier_arrive_expect(base(), 64), ptx::copy_bulk(base() + 64, source, 64, base());
         ptx::mbarrier_wait(base(), 0);
       }},
      {"bulk phase", 1, 32, 128,
       [] {
         if (thread() == 0) ptx::mbarrier_init(base(), 1), ptx::fence_mbarrier_init();
         __syncthreads();
         if (thread() == 0) ptx::mbarrier_arrive_expect(base(), 64), ptx::copy_bulk(base() + 64, source, 64, base());
         ptx::mbarrier_wait(base(), broken);
         out[thread()] = element(4);
         ptx::mbarrier_wait(base(), 0);
       }},
      {"bulk end", 1, 32, 128,
       [] {
         if (thread() == 0) ptx::mbarrier_init(base(), 1), ptx::fence_mbarrier_init();
         __syncthreads();
         if (thread() == 0) ptx::mbarrier_arrive_expect(base(), 64), ptx::copy_bulk(base() + 64, source, 64, base());
         if (!broken) ptx::mbarrier_wait(base(), 0);
       }},
      {"bulk size", 1, 32, 128,
       [] {
         if (thread()) return;
         ptx::mbarrier_init(base(), 1), ptx::fence_mbarrier_init();
         ptx::mbarrier_arrive_expect(base(), 48), ptx::copy_bulk(base() + 64, source, broken ? 40 : 48, base());
         ptx::mbarrier_wait(base(), 0);
       }},
      {"bulk proxy", 1, 32, 128,
       [] {
         if (thread()) return;
         ptx::store_shared(base() + 64, uint4{});
         ptx::mbarrier_init(base(), 1);
         if (broken)
           ptx::fence_mbarrier_init();
         else
           ptx::fence_async_proxy();
         ptx::mbarrier_arrive_expect(base(), 64), ptx::copy_bulk(base() + 64, source, 64, base());
         ptx::mbarrier_wait(base(), 0);
       }},
      {"bulk written meanwhile", 1, 32, 128,
       [] {
         if (thread()) return;
         ptx::mbarrier_init(base(), 1), ptx::fence_mbarrier_init();
         ptx::mbarrier_arrive_expect(base(), 48), ptx::copy_bulk(base() + 64, source, 48, base());
         ptx::store_shared(base() + (broken ? 96 : 112), uint4{});
         ptx::mbarrier_wait(base(), 0);
       }},
      {"poll", 2, 32, 0,
       [] {
         static int counter;
         counter = 0;
         if (thread() == 0 && blockIdx.x == 1 && !broken) ptx::add_release(&counter, 1);
         while (thread() == 0 && blockIdx.x == 0 && ptx::load_acquire(&counter) == 0 && broken) {}
       }},
      {"wgmma proxy", 1, 128, kImage, [] { zeros(!broken), around({}, nothing, left(), right()); }},
      {"wgmma proxy early", 1, 128, kImage,
       [] {
         zeros();
         if (broken) ptx::fence_async_proxy();
         if (thread() == 5) ptx::store_shared(base() + 64, uint4{});
         if (!broken) ptx::fence_async_proxy();
         __syncthreads();
         around({}, nothing, left(), right());
       }},
      {"wgmma proxy of others", 1, 128, kImage,
       [] {
         zeros();
         if (thread() == 5) ptx::store_shared(base() + 64, uint4{});
         if (thread() == (broken ? 6 : 5)) ptx::fence_async_proxy();
         __syncthreads();
         around({}, nothing, left(), right());
       }},
      {"wgmma proxy copy", 1, 128, kImage,
       [] {
         zeros();
         ptx::copy_async(base() + 16 * thread(), source, 0);
         ptx::copy_commit();
         if (broken) ptx::fence_async_proxy();
         ptx::copy_wait<0>();
         if (!broken) ptx::fence_async_proxy();
         __syncthreads();
         around({}, nothing, left(), right());
       }},
      {"wgmma warps differ", 1, 128, kImage,
       [] { zeros(), around({}, nothing, left(broken && thread() > 95 ? 16 : 0), right()); }},
      {"wgmma lanes differ", 1, 128, kImage,
       [] { zeros(), around({}, nothing, left(broken && thread() == 9 ? 16 : 0), right()); }},
      {"wgmma warps missing", 1, 128, kImage, [] { zeros(), around({}, nothing, left(), right(), broken && thread() > 95); }},
      {"wgmma bounds", 1, 128, kImage, [] { zeros(), around({}, nothing, left(), right(16 * broken)); }},
      {"wgmma swizzle", 1, 128, kImage, [] { zeros(), around({}, nothing, left() | uint64_t{broken} << 62, right()); }},
      {"wgmma base offset", 1, 128, kImage, [] { zeros(), around({}, nothing, left() | uint64_t{broken} << 49, right()); }},
      {"wgmma fence", 1, 128, kImage, [] { zeros(), around({!broken}, nothing, left(), right()); }},
      {"wgmma commit", 1, 128, kImage, [] { zeros(), around({true, !broken}, nothing, left(), right()); }},
      {"wgmma wait", 1, 128, kImage, [] { zeros(), around({true, true, !broken}, nothing, left(), right()); }},
      {"wgmma waits differ", 1, 128, kImage,
       [] {
         zeros(), around({}, [](float(&)[32]) { if (broken && thread() < 32) ptx::wgmma_wait<1>(); }, left(), right());
       }},
      {"registers differ", 1, 128, 0,
       [] {
         if (broken && thread() < 32)
           ptx::registers_less<32>();
         else
           ptx::registers_less<24>();
       }},
      {"wgmma read early", 1, 128, kImage,
       [] {
         float early = 0;
         zeros(), around({}, [&](float(&d)[32]) { early = broken ? d[5] : 0.f; }, left(), right());
         out[thread()] = early;
       }},
      {"wgmma written early", 1, 128, kImage,
       [] {
         zeros(), around({}, [](float(&d)[32]) { if (broken) d[5] = 0; }, left(), right());
       }},
      {"wgmma touched", 1, 128, kImage,
       [] {
         zeros();
         const auto touch = [](float(&d)[32]) {
           ptx::wgmma_wait<0>();
           d[7] = 2.f;
           if (!broken) ptx::wgmma_fence();
           product(d, left(), right());
           ptx::wgmma_commit();
         };
         around({}, touch, left(), right());
       }},
      {"wgmma overwritten", 1, 128, kImage,
       [] {
         zeros();
         const auto again = [](float(&d)[32]) {
           ptx::wgmma_wait<0>();
           if (!broken) ptx::wgmma_fence();
           product(d, left(), right(), false);
           ptx::wgmma_commit();
         };
         around({}, again, left(), right());
       }},
      {"wgmma released early", 1, 128, kImage,
       [] {
         zeros();
         const auto release = [](float(&)[32]) {
           if (!broken) ptx::wgmma_wait<0>();
           __syncthreads();
           if (thread() == 0) ptx::store_shared(base() + kB + 32, uint4{1, 1, 1, 1});
           ptx::fence_async_proxy();
           __syncthreads();
         };
         around({}, release, left(), right());
       }},
      {"wgmma unwritten", 1, 128, kImage + 16,
       [] {
         zeros();
         around({}, nothing, left(), right(16 * broken));
       }},
  };
  return all;
}

}  // namespace

// Runs the kernel of this name, with or without its mistake. Its 128 floats are written to `results`.
extern "C" const char* jf_fault(const char* name, int with_mistake, float* results) {
  std::vector<Fault> all = races();
  all.insert(all.end(), faults().begin(), faults().end());
  const auto fault = std::find_if(all.begin(), all.end(), [&](const Fault& f) { return f.name == std::string(name); });
  if (fault == all.end()) return "no such fault";
  broken = with_mistake, out = results;
  std::fill(results, results + 128, 0.f);
  std::fill(std::begin(source), std::end(source), 1.f);
  const char* error =
      emulated_error([&] { launch_emulated(fault->grid, fault->block, fault->shared, 0, fault->kernel); });
  emulated_memory(nullptr, 0);
  return error;
}

#ifdef JF_MAIN
#include <cstdio>

int main(int, char** arguments) {
  float results[128] = {};
  const char* error = jf_fault(arguments[1], arguments[2][0] == '1', results);
  std::printf("%s\n", error ? error : "no error");
}
#else
extern "C" const char* jf_probe(int op, const jf::probe::Case* c, void*) {
  return emulated_error([&] { probe::run(static_cast<probe::Op>(op), *c, nullptr); });
}

extern "C" const char* jf_fault_name(int i) { return i < static_cast<int>(faults().size()) ? faults()[i].name : nullptr; }
#endif
