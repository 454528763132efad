// libopapi: the few aclnn operators that torch_npu calls from C++ without asking the dispatcher. As in CANN,
// an
// operator is prepared by its GetWorkspaceSize function and put on a stream by the function of its own name.
// torch_npu
// finds all of them with dlsym, and reports one that is missing by its name.
#include "elements.h"
#include "sim.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

using sim::Elements;
using sim::Number;

struct aclTensor {
  Elements elements;
};

struct aclScalar {
  aclDataType type;
  char bytes[16];
};

template <class Value>
struct Array {
  std::vector<Value> values;
  Array(const Value* first, uint64_t count) : values(first, first + count) {}
};
struct aclIntArray : Array<int64_t> { using Array::Array; };
struct aclFloatArray : Array<float> { using Array::Array; };
struct aclBoolArray : Array<bool> { using Array::Array; };
struct aclTensorList : Array<aclTensor*> { using Array::Array; };
struct aclScalarList : Array<aclScalar*> { using Array::Array; };

// A prepared operator. It has copies of what it needs: torch_npu destroys the descriptors before the stream
// gets
// there.
struct aclOpExecutor {
  const char* name;
  std::function<void()> run;
};

namespace {

int prepare(const char* name, std::function<void()> run, uint64_t* workspace_size, aclOpExecutor** executor) {
  *workspace_size = 0;
  *executor = new aclOpExecutor{name, std::move(run)};
  return ACL_SUCCESS;
}

int launch(aclOpExecutor* executor, aclrtStream stream) {
  sim::Task task{executor->name, std::move(executor->run)};
  task.kernel = true;
  sim::enqueue(stream, std::move(task));
  delete executor;
  return ACL_SUCCESS;
}

Number value_of(const aclScalar* scalar) { return sim::load_number(scalar->bytes, scalar->type); }

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1;
  for (size_t dimension = sizes.size(); dimension-- > 0;) {
    strides[dimension] = elements;
    elements *= sizes[dimension];
  }
  return strides;
}

// `padding` goes from the last dimension to the first, two numbers each, as in torch.nn.functional.pad;
// negative ones
// cut off.
void pad_elements(
    const Elements& to, Elements from, const std::vector<int64_t>& padding, const Number& value) {
  sim::fill_elements(to, value);
  Elements inner = to;
  inner.sizes = from.sizes;
  for (size_t pair = 0; pair < padding.size() / 2; ++pair) {
    const size_t dimension = to.sizes.size() - 1 - pair;
    const int64_t before = padding[2 * pair], after = padding[2 * pair + 1];
    Elements& shifted = before < 0 ? from : inner;
    const int64_t shift = before < 0 ? -before : before;
    shifted.first += shift * shifted.strides[dimension] * int64_t(sim::element_size(shifted.type));
    inner.sizes[dimension] += std::min<int64_t>(before, 0) + std::min<int64_t>(after, 0);
  }
  from.sizes = inner.sizes;
  sim::copy_elements(inner, from);
}

}  // namespace

extern "C" {

// ---- descriptors ----

aclTensor* aclCreateTensor(
    const int64_t* sizes, uint64_t dimensions, aclDataType type, const int64_t* strides, int64_t offset,
    aclFormat, const int64_t*, uint64_t, void* storage) {
  Elements elements = {static_cast<char*>(storage), type, {sizes, sizes + dimensions}, {}};
  if (strides) {
    elements.strides.assign(strides, strides + dimensions);
  } else {
    elements.strides = contiguous_strides(elements.sizes);
  }
  elements.first += offset * int64_t(sim::element_size(type));
  return new aclTensor{std::move(elements)};
}

int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return ACL_SUCCESS;
}

aclScalar* aclCreateScalar(void* value, aclDataType type) {
  auto* scalar = new aclScalar{type, {}};
  std::memcpy(scalar->bytes, value, sim::element_size(type));
  return scalar;
}

int aclDestroyScalar(const aclScalar* scalar) {
  delete scalar;
  return ACL_SUCCESS;
}

aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) {
  return new aclIntArray(values, count);
}

int aclDestroyIntArray(const aclIntArray* array) {
  delete array;
  return ACL_SUCCESS;
}

aclFloatArray* aclCreateFloatArray(const float* values, uint64_t count) {
  return new aclFloatArray(values, count);
}

int aclDestroyFloatArray(const aclFloatArray* array) {
  delete array;
  return ACL_SUCCESS;
}

aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t count) {
  return new aclBoolArray(values, count);
}

int aclDestroyBoolArray(const aclBoolArray* array) {
  delete array;
  return ACL_SUCCESS;
}

aclTensorList* aclCreateTensorList(aclTensor* const* tensors, uint64_t count) {
  return new aclTensorList(tensors, count);
}

int aclDestroyTensorList(const aclTensorList* list) {
  for (const aclTensor* tensor : list->values) delete tensor;
  delete list;
  return ACL_SUCCESS;
}

aclScalarList* aclCreateScalarList(aclScalar* const* scalars, uint64_t count) {
  return new aclScalarList(scalars, count);
}

int aclDestroyScalarList(const aclScalarList* list) {
  for (const aclScalar* scalar : list->values) delete scalar;
  delete list;
  return ACL_SUCCESS;
}

int aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  delete executor;
  return ACL_SUCCESS;
}

// ---- operators ----

int aclnnInplaceCopyGetWorkspaceSize(aclTensor* to, const aclTensor* from, uint64_t* workspace_size,
                                     aclOpExecutor** executor) {
  auto run = [to = to->elements, from = from->elements] { sim::copy_elements(to, from); };
  return prepare("aclnnInplaceCopy", run, workspace_size, executor);
}

int aclnnInplaceCopy(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
  return launch(executor, stream);
}

int aclnnCastGetWorkspaceSize(const aclTensor* from, aclDataType, aclTensor* to, uint64_t* workspace_size,
                              aclOpExecutor** executor) {
  auto run = [to = to->elements, from = from->elements] { sim::copy_elements(to, from); };
  return prepare("aclnnCast", run, workspace_size, executor);
}

int aclnnCast(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
  return launch(executor, stream);
}

int aclnnInplaceZeroGetWorkspaceSize(aclTensor* to, uint64_t* workspace_size, aclOpExecutor** executor) {
  auto run = [to = to->elements] { sim::fill_elements(to, Number{true, 0, 0.0}); };
  return prepare("aclnnInplaceZero", run, workspace_size, executor);
}

int aclnnInplaceZero(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
  return launch(executor, stream);
}

int aclnnInplaceOneGetWorkspaceSize(aclTensor* to, uint64_t* workspace_size, aclOpExecutor** executor) {
  auto run = [to = to->elements] { sim::fill_elements(to, Number{true, 1, 1.0}); };
  return prepare("aclnnInplaceOne", run, workspace_size, executor);
}

int aclnnInplaceOne(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
  return launch(executor, stream);
}

int aclnnInplaceFillScalarGetWorkspaceSize(aclTensor* to, const aclScalar* value, uint64_t* workspace_size,
                                           aclOpExecutor** executor) {
  auto run = [to = to->elements, value = value_of(value)] { sim::fill_elements(to, value); };
  return prepare("aclnnInplaceFillScalar", run, workspace_size, executor);
}

int aclnnInplaceFillScalar(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
  return launch(executor, stream);
}

int aclnnInplaceFillTensorGetWorkspaceSize(aclTensor* to, const aclTensor* value, uint64_t* workspace_size,
                                           aclOpExecutor** executor) {
  auto run = [to = to->elements, value = value->elements] { sim::copy_elements(to, value); };
  return prepare("aclnnInplaceFillTensor", run, workspace_size, executor);
}

int aclnnInplaceFillTensor(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
  return launch(executor, stream);
}

int aclnnConstantPadNdGetWorkspaceSize(
    const aclTensor* from, const aclIntArray* padding, const aclScalar* value, aclTensor* to,
    uint64_t* workspace_size, aclOpExecutor** executor) {
  auto run = [to = to->elements, from = from->elements, padding = padding->values, value = value_of(value)] {
    pad_elements(to, from, padding, value);
  };
  return prepare("aclnnConstantPadNd", run, workspace_size, executor);
}

int aclnnConstantPadNd(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
  return launch(executor, stream);
}

}  // extern "C"
