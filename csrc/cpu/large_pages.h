// Large results on huge pages. A fresh tensor of 64 MB otherwise costs 16,384 page faults, more time than the op
// itself, where the system leaves the choice to programs (transparent_hugepage = madvise, the default of several
// distributions).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mixkd {

// The tensor, its whole huge pages asked for as such. Only an advice: where it is not followed nothing changes.
inline torch::stable::Tensor on_large_pages(torch::stable::Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = uintptr_t(2) << 20, WORTH_A_CALL = 2 * PAGE;
  const uintptr_t data = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = (data + tensor.numel() * tensor.element_size()) / PAGE * PAGE;
  const uintptr_t begin = (data + PAGE - 1) / PAGE * PAGE;
  if (end >= begin + WORTH_A_CALL) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace mixkd
