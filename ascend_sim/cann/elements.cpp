#include "elements.h"

#include "sim.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

namespace sim {
namespace {

// g++ 12 has _Float16, but no bfloat16 on x86.
struct BFloat16 {
  uint16_t bits = 0;

  BFloat16() = default;
  explicit BFloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const uint32_t to_nearest_even = 0x7fff + ((wide >> 16) & 1);
    bits = value != value ? 0x7fc0 : (wide + to_nearest_even) >> 16;
  }
  explicit operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

[[noreturn]] void type_not_simulated(aclDataType type) {
  not_simulated(("aclnn operator on aclDataType " + std::to_string(type)).c_str());
}

// Call `visit` with a value of the C++ type that `type` stands for.
template <class Visit>
auto with_element_type(aclDataType type, Visit visit) {
  switch (type) {
    case ACL_FLOAT: return visit(float());
    case ACL_DOUBLE: return visit(double());
    case ACL_FLOAT16: return visit(_Float16());
    case ACL_BF16: return visit(BFloat16());
    case ACL_BOOL: return visit(bool());
    case ACL_INT8: return visit(int8_t());
    case ACL_INT16: return visit(int16_t());
    case ACL_INT32: return visit(int32_t());
    case ACL_INT64: return visit(int64_t());
    case ACL_UINT8: return visit(uint8_t());
    case ACL_UINT16: return visit(uint16_t());
    case ACL_UINT32: return visit(uint32_t());
    case ACL_UINT64: return visit(uint64_t());
    case ACL_COMPLEX64: return visit(std::complex<float>());
    case ACL_COMPLEX128: return visit(std::complex<double>());
    default: type_not_simulated(type);
  }
}

template <class Element>
Number load(const char* from) {
  Element element;
  std::memcpy(&element, from, sizeof element);
  if constexpr (std::is_integral_v<Element>) {
    return {true, int64_t(element), double(element)};
  } else if constexpr (std::is_same_v<Element, BFloat16> || std::is_same_v<Element, _Float16>) {
    return {false, 0, double(float(element))};
  } else {
    return {false, 0, std::complex<double>(element)};
  }
}

template <class Element>
void store(char* to, const Number& value) {
  const double real = value.inexact.real();
  Element element;
  if constexpr (std::is_same_v<Element, bool>) {
    element = value.inexact != 0.0;
  } else if constexpr (std::is_integral_v<Element>) {
    element = Element(value.is_whole ? value.whole : int64_t(real));
  } else if constexpr (std::is_floating_point_v<Element>) {
    element = value.is_whole ? Element(value.whole) : Element(real);
  } else if constexpr (std::is_same_v<Element, BFloat16> || std::is_same_v<Element, _Float16>) {
    element = Element(value.is_whole ? float(value.whole) : float(real));
  } else {
    element = Element(value.inexact);
  }
  std::memcpy(to, &element, sizeof element);
}

using Load = Number (*)(const char*);
using Store = void (*)(char*, const Number&);

Load loader(aclDataType type) {
  return with_element_type(type, [](auto sample) -> Load { return &load<decltype(sample)>; });
}

Store storer(aclDataType type) {
  return with_element_type(type, [](auto sample) -> Store { return &store<decltype(sample)>; });
}

// One innermost row of a copy or a fill; steps are in bytes.
struct Row {
  char* to;
  const char* from;
  int64_t to_step, from_step, count;
};

template <size_t size>
void copy_row(const Row& row) {
  for (int64_t i = 0; i < row.count; ++i) {
    std::memcpy(row.to + i * row.to_step, row.from + i * row.from_step, size);
  }
}

void copy_row_of_equal_type(const Row& row, int64_t size) {
  if (row.to_step == size && row.from_step == size) {
    std::memcpy(row.to, row.from, row.count * size);
    return;
  }
  switch (size) {
    case 1: return copy_row<1>(row);
    case 2: return copy_row<2>(row);
    case 4: return copy_row<4>(row);
    case 8: return copy_row<8>(row);
    default: return copy_row<16>(row);
  }
}

// Two blocks of memory that are walked together, one dimension inside the other.
struct Walk {
  std::vector<int64_t> sizes, to_steps, from_steps;
};

template <class DoRow>
void each_row(const Walk& walk, size_t dimension, char* to, const char* from, const DoRow& do_row) {
  if (walk.sizes.empty()) return do_row(Row{to, from, 0, 0, 1});
  const int64_t to_step = walk.to_steps[dimension], from_step = walk.from_steps[dimension];
  const int64_t count = walk.sizes[dimension];
  if (dimension + 1 == walk.sizes.size()) return do_row(Row{to, from, to_step, from_step, count});
  for (int64_t i = 0; i < count; ++i) {
    each_row(walk, dimension + 1, to + i * to_step, from + i * from_step, do_row);
  }
}

std::vector<int64_t> byte_steps(const Elements& elements) {
  std::vector<int64_t> steps = elements.strides;
  for (int64_t& step : steps) step *= element_size(elements.type);
  return steps;
}

// The steps of `from` for the dimensions of `to`: 0 where an element is repeated.
std::vector<int64_t> broadcast_steps(const Elements& from, const Elements& to) {
  const std::vector<int64_t> own = byte_steps(from);
  std::vector<int64_t> steps(to.sizes.size(), 0);
  const size_t common = std::min(own.size(), steps.size());
  for (size_t back = 1; back <= common; ++back) {
    if (from.sizes[own.size() - back] != 1) steps[steps.size() - back] = own[own.size() - back];
  }
  return steps;
}

}  // namespace

size_t element_size(aclDataType type) {
  const bool float8 = type >= ACL_HIFLOAT8 && type <= ACL_FLOAT8_E8M0;  // copied, never converted
  if (float8) return 1;
  return with_element_type(type, [](auto sample) { return sizeof sample; });
}

Number load_number(const char* from, aclDataType type) { return loader(type)(from); }

void copy_elements(const Elements& to, const Elements& from) {
  const Walk walk = {to.sizes, byte_steps(to), broadcast_steps(from, to)};
  if (to.type == from.type) {
    const int64_t size = element_size(to.type);
    auto copy = [size](const Row& row) { copy_row_of_equal_type(row, size); };
    return each_row(walk, 0, to.first, from.first, copy);
  }
  const Load load_one = loader(from.type);
  const Store store_one = storer(to.type);
  each_row(walk, 0, to.first, from.first, [=](const Row& row) {
    for (int64_t i = 0; i < row.count; ++i) {
      store_one(row.to + i * row.to_step, load_one(row.from + i * row.from_step));
    }
  });
}

void fill_elements(const Elements& to, const Number& value) {
  char element[16];
  storer(to.type)(element, value);
  copy_elements(to, Elements{element, to.type, {}, {}});
}

}  // namespace sim
