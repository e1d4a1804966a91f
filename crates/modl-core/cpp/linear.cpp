// Linear layers by products of our own, forward and backward; see src/linear.rs for where.

#include <algorithm>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include "products.h"
#include "told.h"

#if defined(__x86_64__)

namespace {

using at::Tensor;
using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Multiplications for which one more thread is worth being called.
constexpr int64_t kOfThread = 1 << 19;
// Narrower sums are left to libtorch's BLAS, which does no worse.
constexpr int64_t kNarrow = 24;
// So are gradients of fewer tokens, and those with fewer columns than are in a vector.
constexpr int64_t kFewTokens = 4;
// A gradient with so many numbers has left the second cache before anybody reads it.
constexpr int64_t kStreamed = 1 << 17;
// Rows whose sum needs no care for the last digits.
constexpr int64_t kShortSum = 64;

// task(first, last) for parts of `n`, each a multiple of `step` but the last one, on libtorch's threads.
template <typename Task>
void divided(int64_t n, int64_t step, int64_t work, const Task& task) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t steps = products::rounded(n, step);
  const int64_t parts = std::max<int64_t>(1, std::min({threads, steps, work / kOfThread}));
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = products::part(steps, i, parts) * step;
      task(first, std::min(n, products::part(steps, i + 1, parts) * step));
    }
  };
  parts == 1 ? run(0, 1) : at::parallel_for(0, parts, 1, run);
}

// y = x wᵀ + b, x `[tokens, k]` and w `[n, k]`.
void forward(const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor& y) {
  const int64_t n = w.size(0), k = w.size(1), tokens = x.numel() / k;
  const float *xs = x.const_data_ptr<float>(), *ws = w.const_data_ptr<float>();
  const float* b = bias ? bias->const_data_ptr<float>() : nullptr;
  float* ys = y.mutable_data_ptr<float>();
  if (tokens >= n) {
    divided(tokens, products::kPanel, tokens * n * k, [&](int64_t t, int64_t end) {
      products::linear(end - t, n, k, xs + t * k, ws, b, ys + t * n, n);
    });
  } else {
    divided(n, products::kRows, tokens * n * k, [&](int64_t i, int64_t end) {
      products::linear(tokens, end - i, k, xs, ws + i * k, b ? b + i : nullptr, ys + i, n);
    });
  }
}

// a b, `[m, k]` by `[k, n]`: without gaps, a may lie turned.
Tensor product(const Tensor& a, const Tensor& b, bool stream) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  const Tensor c = at::empty({m, n}, b.options().requires_grad(false));
  const products::Matrix of_a{a.const_data_ptr<float>(), a.stride(0), a.stride(1)};
  const float* of_b = b.const_data_ptr<float>();
  float* to = c.mutable_data_ptr<float>();
  if (m >= n) {
    divided(m, products::kRows, m * n * k, [&](int64_t i, int64_t end) {
      products::product(end - i, n, k, of_a.from(i, 0), of_b, n, to + i * n, n, stream);
    });
  } else {
    divided(n, products::kPanel, m * n * k, [&](int64_t j, int64_t end) {
      products::product(m, end - j, k, of_a, of_b + j, n, to + j, n, stream);
    });
  }
  return c;
}

Tensor column_sums(const Tensor& rows) {
  if (rows.size(0) > kShortSum) return rows.sum(0);
  const Tensor sums = at::empty({rows.size(1)}, rows.options().requires_grad(false));
  products::column_sums(
      rows.const_data_ptr<float>(), rows.size(0), rows.size(1), sums.mutable_data_ptr<float>());
  return sums;
}

// Inputs are x `[..., k]`, w `[n, k]`, and the bias where there is one.
struct Linear : public Node {
  SavedVariable x, w;  // where the gradient of the other is wanted
  std::vector<int64_t> x_size;

  variable_list apply(variable_list&& gradients) override {
    variable_list result(num_outputs());
    const Tensor& of_y = gradients[0];
    if (!of_y.defined()) return result;
    const bool differentiable = at::GradMode::is_enabled();
    Tensor dy = of_y.reshape({-1, of_y.size(-1)});
    if (!differentiable) dy = dy.contiguous();
    const auto by = [&](const Tensor& a, const Tensor& b, bool stream) {
      const bool own = !differentiable && dy.size(0) >= kFewTokens && b.size(1) > products::kLanes;
      return own ? product(a, b, stream) : a.mm(b);
    };
    if (task_should_compute_output(0)) result[0] = by(dy, w.unpack(), false).reshape(x_size);
    if (task_should_compute_output(1)) {
      const bool large = dy.size(1) * x_size.back() >= kStreamed;
      result[1] = by(dy.t(), x.unpack().reshape({-1, x_size.back()}), large);
    }
    if (num_outputs() > 2 && task_should_compute_output(2)) {
      result[2] = differentiable ? dy.sum(0) : column_sums(dy);
    }
    return result;
  }

  void release_variables() override {
    x.reset_data();
    w.reset_data();
  }

  std::string name() const override { return "Linear"; }
};

bool plain(const Tensor& t) {
  return t.is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous();
}

bool suits(const Tensor& x, const Tensor& w, const Tensor* bias) {
  return plain(x) && plain(w) && w.dim() == 2 && x.dim() >= 1 && x.size(-1) == w.size(1) &&
      w.size(0) > 1 && w.size(1) >= kNarrow && x.numel() > 0 &&
      (!bias || (plain(*bias) && bias->dim() == 1 && bias->size(0) == w.size(0)));
}

}  // namespace

#endif

extern "C" {

// `*result` = x wᵀ + bias, which may be null; null where libtorch's own way is to be taken.
char* modl_linear(at::Tensor* x, at::Tensor* w, at::Tensor* bias, at::Tensor** result) {
  *result = nullptr;
#if defined(__x86_64__)
  return told([&] {
    if (!products::supported() || !suits(*x, *w, bias)) return;
    std::vector<int64_t> shape = x->sizes().vec();
    shape.back() = w->size(0);
    Tensor y = at::empty(shape, x->options().requires_grad(false));
    forward(*x, *w, bias, y);
    const bool asked = x->requires_grad() || w->requires_grad() || (bias && bias->requires_grad());
    if (asked && at::GradMode::is_enabled()) {
      auto node = c10::make_intrusive<Linear>();
      edge_list next;
      for (const Tensor* t : {x, w, bias}) {
        if (!t) continue;
        next.push_back(t->requires_grad() ? torch::autograd::impl::gradient_edge(*t) : Edge());
      }
      if (w->requires_grad()) node->x = SavedVariable(*x, false);
      if (x->requires_grad()) node->w = SavedVariable(*w, false);
      node->x_size = x->sizes().vec();
      node->set_next_edges(std::move(next));
      torch::autograd::set_history(y, node);
    }
    *result = new Tensor(std::move(y));
  });
#else
  return nullptr;
#endif
}

}  // extern "C"
