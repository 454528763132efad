// Elements of device memory as the aclnn operators see them: a data type, sizes, strides. Only torch_npu's
// own copies and fills come here; all other operators run PyTorch's CPU kernels (aten_*.cpp).
#pragma once

#include <acl/acl.h>

#include <complex>
#include <cstdint>
#include <vector>

namespace sim {

struct Elements {
  char* first;  // the element at index 0, 0, ...
  aclDataType type;
  std::vector<int64_t> sizes, strides;  // in elements
};

// A value of any element type. Whole numbers stay exact beyond 2^53.
struct Number {
  bool is_whole;
  int64_t whole;
  std::complex<double> inexact;
};

size_t element_size(aclDataType type);
Number load_number(const char* from, aclDataType type);

// `from` is broadcast to the sizes of `to` and converted to its type.
void copy_elements(const Elements& to, const Elements& from);

void fill_elements(const Elements& to, const Number& value);

}  // namespace sim
