// The run-time under the emulated CUDA: threads of a block as fibers, and a check of every access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace cvfast::emulation {

using Site = std::source_location;

// Waits for the whole block; returns for how many threads `predicate` is true.
int block_barrier(int predicate, Site site);

void warp_barrier(unsigned mask, Site site);

unsigned ballot(unsigned mask, bool predicate, Site site);

// The lanes of the warp that have not exited.
unsigned active_mask();

enum class Shuffle { index, up, down, exclusive_or };

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int argument, int width, Site site);

// Checks a read and write of `bytes` that other threads' atomic accesses do not race with.
void atomic_access(const void* address, size_t bytes);

// Check an access that the compiler did not see: its alignment, bounds, order.
void read_access(const void* address, size_t bytes);
void write_access(const void* address, size_t bytes);

// cp.async: the copy lands when the thread waits for its group; until then the bytes are poison.
void copy_async(void* shared, const void* global, size_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

// ldmatrix of `count` matrices: see csrc/cuda/ptx.cuh.
void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, Site site);

enum class Mma { half, bfloat16, tf32 };

// c += a b on one warp: see csrc/cuda/ptx.cuh.
void multiply_matrices(Mma type, float* c, const uint32_t* a, const uint32_t* b, Site site);

void* dynamic_shared_base();

}  // namespace cvfast::emulation
