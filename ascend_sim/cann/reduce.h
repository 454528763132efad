// Element-wise reductions, in the order of ranks: every member computes the same bits.
#pragma once

#include <hccl/hccl_types.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "sim.h"

namespace sim::hccl {

// The 16-bit floats compute as float and round once per step, to the nearest, ties to even.
struct Bfloat16 {
  std::uint16_t bits;

  operator float() const {
    const std::uint32_t wide = std::uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }

  static Bfloat16 from(float value) {
    if (std::isnan(value)) return {0x7fc0};
    std::uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const std::uint32_t half_minus_tie = 0x7fff + ((wide >> 16) & 1);
    return {static_cast<std::uint16_t>((wide + half_minus_tie) >> 16)};
  }
};

struct Float16 {
  _Float16 half;

  operator float() const { return static_cast<float>(half); }
  static Float16 from(float value) { return {static_cast<_Float16>(value)}; }
};

template <class Number>
Number reduce_two(Number left, Number right, HcclReduceOp operation) {
  switch (operation) {
    case HCCL_REDUCE_SUM: return static_cast<Number>(left + right);
    case HCCL_REDUCE_PROD: return static_cast<Number>(left * right);
    case HCCL_REDUCE_MAX: return std::max(left, right);
    case HCCL_REDUCE_MIN: return std::min(left, right);
    default: not_simulated(("a reduction with operation " + std::to_string(operation)).c_str());
  }
}

inline Bfloat16 reduce_two(Bfloat16 left, Bfloat16 right, HcclReduceOp operation) {
  return Bfloat16::from(reduce_two<float>(left, right, operation));
}

inline Float16 reduce_two(Float16 left, Float16 right, HcclReduceOp operation) {
  return Float16::from(reduce_two<float>(left, right, operation));
}

template <class Element>
void reduce_elements(void* into, const void* from, std::size_t count, HcclReduceOp operation) {
  auto* left = static_cast<Element*>(into);
  const auto* right = static_cast<const Element*>(from);
  for (std::size_t i = 0; i < count; ++i) left[i] = reduce_two(left[i], right[i], operation);
}

inline void reduce(void* into, const void* from, std::size_t count, HcclDataType data_type,
                   HcclReduceOp operation) {
  switch (data_type) {
    case HCCL_DATA_TYPE_INT8: return reduce_elements<std::int8_t>(into, from, count, operation);
    case HCCL_DATA_TYPE_UINT8: return reduce_elements<std::uint8_t>(into, from, count, operation);
    case HCCL_DATA_TYPE_INT16: return reduce_elements<std::int16_t>(into, from, count, operation);
    case HCCL_DATA_TYPE_INT32: return reduce_elements<std::int32_t>(into, from, count, operation);
    case HCCL_DATA_TYPE_INT64: return reduce_elements<std::int64_t>(into, from, count, operation);
    case HCCL_DATA_TYPE_UINT64: return reduce_elements<std::uint64_t>(into, from, count, operation);
    case HCCL_DATA_TYPE_FP16: return reduce_elements<Float16>(into, from, count, operation);
    case HCCL_DATA_TYPE_BFP16: return reduce_elements<Bfloat16>(into, from, count, operation);
    case HCCL_DATA_TYPE_FP32: return reduce_elements<float>(into, from, count, operation);
    case HCCL_DATA_TYPE_FP64: return reduce_elements<double>(into, from, count, operation);
    default: not_simulated(("a reduction of HCCL data type " + std::to_string(data_type)).c_str());
  }
}

}  // namespace sim::hccl
