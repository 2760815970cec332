// Memory that is kept from call to call, because fresh pages cost more than the work done in them.
#pragma once

#include <cstddef>
#include <new>
#if defined(__linux__)
  #include <sys/mman.h>
#endif

namespace revit::cpu {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // At least `bytes` of uninitialised memory, valid until the next call.
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      release();
      const size_t size = bytes >= kHugeFrom ? (bytes + kHugePage - 1) / kHugePage * kHugePage : bytes;
      alignment_ = bytes >= kHugeFrom ? kHugePage : 64;
      data_ = static_cast<char*>(::operator new(size, std::align_val_t{alignment_}));
      size_ = size;  // set only once there is memory: the next call may follow a failed one
#if defined(__linux__)
      // A pass over panels in small pages spends a seventh of its time on address translation.
      if (alignment_ == kHugePage) madvise(data_, size_, MADV_HUGEPAGE);
#endif
    }
    return data_;
  }

  // Frees the memory if it is more than `bytes`.
  void shrink(size_t bytes) {
    if (size_ > bytes) release();
  }

 private:
  static constexpr size_t kHugePage = 2 << 20;
  static constexpr size_t kHugeFrom = 128 << 10;

  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{alignment_});
    data_ = nullptr;
    size_ = 0;
  }

  char* data_ = nullptr;
  size_t size_ = 0;
  size_t alignment_ = 64;
};

}  // namespace revit::cpu
