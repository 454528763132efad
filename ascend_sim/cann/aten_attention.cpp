// npu_fused_infer_attention_score, as one task of the stream: raw addresses, and lengths by value.
//
// One task, because torch_npu changes the lengths in a captured graph by calling the operator once more
// between aclmdlRICaptureTaskUpdateBegin and -End, where CANN takes the same number of tasks as was captured.
// Operators of aten, one by one, would also leave the graph with intermediate results that are freed.
//
// What it does not do is refused by the caller's thread, with the name of the argument.
#include "aten_attention.h"

#include "aten_stream.h"
#include "aten_tensors.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace ascend_sim {
namespace {

using torch::jit::Stack;

constexpr int64_t workspace_bytes = 1024;

const char* const computed[] = {
    "query",       "key",       "value",        "actual_seq_lengths",  "actual_seq_lengths_kv",
    "block_table", "num_heads", "input_layout", "num_key_value_heads", "scale",
    "block_size",  "workspace", "out",
};

// The arguments of an operator by their names.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack) : schema_(op.schema()) {
    const size_t count = schema_.arguments().size();
    values_.assign(std::make_move_iterator(stack->end() - count), std::make_move_iterator(stack->end()));
    stack->resize(stack->size() - count);
  }

  // None where the operator has no such argument.
  c10::IValue operator[](const std::string& name) const {
    const auto index = schema_.argumentIndexWithName(name);
    return index ? values_[*index] : c10::IValue();
  }

  at::Tensor tensor(const std::string& name) const {
    const c10::IValue value = (*this)[name];
    return value.isTensor() ? value.toTensor() : at::Tensor();
  }

  std::vector<int64_t> numbers(const std::string& name) const {
    const c10::IValue value = (*this)[name];
    return value.isNone() ? std::vector<int64_t>() : value.toIntVector();
  }

  [[noreturn]] void refuse(const std::string& what) const {
    TORCH_CHECK_NOT_IMPLEMENTED(false, schema_.name(), " with ", what, " on the simulated Ascend");
  }

  void refuse_what_is_not_computed() const {
    for (size_t i = 0; i < values_.size(); ++i) {
      const c10::Argument& argument = schema_.arguments()[i];
      const bool known = std::any_of(std::begin(computed), std::end(computed), [&](const char* name) {
        return argument.name() == name;
      });
      const bool as_by_default = argument.default_value() && values_[i] == *argument.default_value();
      if (!known && !as_by_default) refuse(argument.name());
    }
  }

 private:
  const c10::FunctionSchema& schema_;
  Stack values_;
};

// One sequence: which rows of the query, and which keys and values, in pages or one behind the other.
struct Sequence {
  int64_t first_row, rows;    // of the query
  int64_t first_token, kv_tokens;  // without pages: from there on; with pages: how many from the first one
};

// Everything that the task needs. Tensors are views that own nothing, as a kernel's arguments on a device.
struct Attention {
  at::Tensor query;           // [rows, H, D]
  at::Tensor keys, values;    // [tokens, G, D], or with pages [pages, slots, G, D]
  at::Tensor block_table;     // [sequences, pages of the longest], or undefined
  at::Tensor out;             // as query
  at::Tensor workspace;       // or undefined
  std::vector<Sequence> sequences;
  double scale;

  void run() const {
    const c10::InferenceMode no_autograd;
    // Only for this task: whoever keeps something there loses it, as on a device.
    if (workspace.defined()) std::memset(workspace.data_ptr(), 0xff, workspace.nbytes());
    for (size_t i = 0; i < sequences.size(); ++i) attend(int64_t(i));
  }

 private:
  void attend(int64_t number) const {
    const Sequence& sequence = sequences[number];
    const at::Tensor rows = query.narrow(0, sequence.first_row, sequence.rows);
    const at::Tensor to = out.narrow(0, sequence.first_row, sequence.rows);
    // A row that only fills up a batch has no tokens. Nobody reads what comes out, but it goes through the
    // layers behind this one, and must not become slow or NaN there.
    if (sequence.kv_tokens == 0) {
      to.zero_();
      return;
    }
    const int64_t share = query.size(1) / keys.size(-2);
    const at::Tensor q = rows.transpose(0, 1).to(at::kFloat);
    const at::Tensor k = of_all_heads(keys, number, share), v = of_all_heads(values, number, share);
    const at::Tensor scores = at::matmul(q, k.transpose(1, 2)).mul(scale);
    to.copy_(at::matmul(at::softmax(scores, -1), v).transpose(0, 1));
  }

  // [H, tokens, D] in float32, each head of keys or values for the `share` heads of the query that use it.
  at::Tensor of_all_heads(const at::Tensor& cache, int64_t number, int64_t share) const {
    const Sequence& sequence = sequences[number];
    at::Tensor tokens = cache;
    if (block_table.defined()) {
      const int64_t pages = (sequence.kv_tokens + cache.size(1) - 1) / cache.size(1);
      tokens = cache.index_select(0, block_table[number].narrow(0, 0, pages).to(at::kLong)).flatten(0, 1);
    }
    tokens = tokens.narrow(0, sequence.first_token, sequence.kv_tokens);
    return tokens.transpose(0, 1).to(at::kFloat).repeat_interleave(share, 0);
  }
};

int64_t heads_of_keys(const Call& call) {
  const int64_t given = call["num_key_value_heads"].toInt();
  return given ? given : call["num_heads"].toInt();
}

// Layout TND: sequences one behind the other in query, keys and values alike, each list says where they end.
std::vector<Sequence> sequences_in_a_row(const Call& call) {
  const std::vector<int64_t> ends = call.numbers("actual_seq_lengths");
  if (ends != call.numbers("actual_seq_lengths_kv")) call.refuse("other lengths of keys than of the query");
  if (ends.empty() || ends.back() != call.tensor("query").size(0)) call.refuse("rows behind the last end");
  std::vector<Sequence> sequences;
  int64_t begin = 0;
  for (const int64_t end : ends) {
    sequences.push_back({begin, end - begin, begin, end - begin});
    begin = end;
  }
  return sequences;
}

// Layouts BSH and BSND with pages: a request a row of the block table, its length in a list.
std::vector<Sequence> sequences_in_pages(const Call& call) {
  const at::Tensor query = call.tensor("query"), block_table = call.tensor("block_table");
  const std::vector<int64_t> lengths = call.numbers("actual_seq_lengths_kv");
  const int64_t slots = call.tensor("key").size(1), requests = query.size(0), rows = query.size(1);
  if (!call.numbers("actual_seq_lengths").empty()) call.refuse("actual_seq_lengths and a block table");
  if (int64_t(lengths.size()) != requests || block_table.size(0) != requests) {
    call.refuse("another number of lengths or of rows of the block table than of requests");
  }
  if (call["block_size"].toInt() != slots) call.refuse("a block_size that is not that of the cache");
  std::vector<Sequence> sequences;
  for (int64_t request = 0; request < requests; ++request) {
    if (lengths[request] > block_table.size(1) * slots) call.refuse("a length beyond the block table");
    sequences.push_back({request * rows, rows, 0, lengths[request]});
  }
  return sequences;
}

Attention attention_of(const Call& call, const at::Tensor& out) {
  call.refuse_what_is_not_computed();
  const std::string layout = call["input_layout"].toStringRef();
  const bool in_pages = call.tensor("block_table").defined();
  if (in_pages ? layout != "BSH" && layout != "BSND" : layout != "TND") {
    call.refuse("layout " + layout + (in_pages ? " and" : " without") + " a block table");
  }
  const int64_t heads = call["num_heads"].toInt(), of_keys = heads_of_keys(call);
  const at::Tensor query = host_view(call.tensor("query"));
  const int64_t width = layout == "BSH" ? query.size(-1) / heads : query.size(-1);
  auto by_heads = [&](const std::string& name) {
    const at::Tensor cache = host_view(call.tensor(name));
    return in_pages ? cache.view({cache.size(0), cache.size(1), of_keys, width}) : cache;
  };
  Attention attention;
  attention.query = query.view({-1, heads, width});
  attention.keys = by_heads("key");
  attention.values = by_heads("value");
  attention.block_table = host_view(call.tensor("block_table"));
  attention.out = host_view(out).view({-1, heads, width});
  attention.workspace = host_view(call.tensor("workspace"));
  attention.sequences = in_pages ? sequences_in_pages(call) : sequences_in_a_row(call);
  attention.scale = call["scale"].toDouble();
  return attention;
}

void launch_attention(const Call& call, const at::Tensor& out) {
  const c10::OptionalDeviceGuard guard(call.tensor("query").device());
  launch(
      "npu_fused_infer_attention_score",
      [attention = attention_of(call, out)] { attention.run(); });
}

// The second result, the logarithm of the softmax's sum, is asked for by nobody: `softmax_lse_flag` is refused.
std::pair<at::Tensor, at::Tensor> empty_results(const at::Tensor& query) {
  return {at::empty(query.sizes(), query.options()), at::empty({1}, query.options().dtype(at::kFloat))};
}

void attention(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const Call call(op, stack);
  const auto [out, sum] = empty_results(call.tensor("query"));
  launch_attention(call, out);
  torch::jit::push(stack, out, sum);
}

void attention_out(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const Call call(op, stack);
  const std::vector<at::Tensor> out = call["out"].toTensorVector();
  if (out.size() != 2) call.refuse("another number of outputs than 2");
  launch_attention(call, out[0]);
  torch::jit::push(stack, out[0], out[1]);
}

void workspace(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const Call call(op, stack);
  call.refuse_what_is_not_computed();
  const at::Tensor query = call.tensor("query");
  torch::jit::push(stack, at::empty({workspace_bytes}, query.options().dtype(at::kByte)));
}

void results(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const Call call(op, stack);
  const auto [out, sum] = empty_results(call.tensor("query"));
  torch::jit::push(stack, out, sum);
}

}  // namespace

int install_attention(torch::Library& npu_kernels) {
  const std::string name = "npu_fused_infer_attention_score";
  npu_kernels.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&attention>());
  npu_kernels.impl((name + ".out").c_str(), torch::CppFunction::makeFromBoxedFunction<&attention_out>());
  const std::string prefix = "_" + name;
  npu_kernels.impl(
      (prefix + "_get_max_workspace").c_str(), torch::CppFunction::makeFromBoxedFunction<&workspace>());
  npu_kernels.impl(
      (prefix + "_infer_output").c_str(), torch::CppFunction::makeFromBoxedFunction<&results>());
  return 4;
}

}  // namespace ascend_sim
