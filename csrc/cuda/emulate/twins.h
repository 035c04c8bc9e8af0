// Plain functions that emulate the PTX instructions. The wrappers in ptx.h call them and pass template parameters as
// arguments. The functions are defined in memory.cpp, barriers.cpp, products.cpp and grids.cpp.
#pragma once

#include <cstdint>

namespace jf::twin {

unsigned char* arena();
uint32_t shared_address(const void* at);
void store_shared(uint32_t at, const uint32_t* cell);
void ldmatrix(uint32_t* r, uint32_t row, bool transposed);
void mma(float* d, const uint32_t* a, const uint32_t* b, int k, bool half);
void copy_async(uint32_t to, const void* from, uint32_t bytes);
void copy_commit();
void copy_wait(int newest);
void barrier(int id, int threads, bool wait);
float shuffle_xor(float x, int lanes);
void mbarrier_init(uint32_t barrier, uint32_t count);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier, uint32_t bytes, bool expect);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
void fence_async_proxy();
void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void prefetch_bulk(const void* from, uint32_t bytes);
void registers(int count, bool more);
void grid_dependency(bool wait);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int newest);
void wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulate, bool a_mn, bool b_mn, bool half);
int load_acquire(const int* at);
int add_release(int* at, int value);

}  // namespace jf::twin
