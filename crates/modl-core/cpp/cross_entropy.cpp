// The cross entropy of rows with few classes in one pass each way, where libtorch has an operation for each
// step; see src/cross_entropy.rs.

#include <algorithm>
#include <cmath>
#include <vector>

#include "node.h"
#include "told.h"

namespace {

// The input are logits `[rows, classes]`.
struct CrossEntropy : public Node {
  SavedVariable logits;
  Tensor shares;  // softmax of the logits
  std::vector<int64_t> classes;

  variable_list apply(variable_list&& gradients) override {
    variable_list result(1);
    const Tensor& of_losses = gradients[0];
    if (!of_losses.defined()) return result;
    need_kept(shares.defined());
    const int64_t n = shares.size(0), width = shares.size(1);
    if (at::GradMode::is_enabled()) {
      const Tensor right = at::one_hot(at::tensor(classes, at::kLong), width);
      result[0] = of_losses.unsqueeze(1) * (logits.unpack().softmax(-1) - right);
      return result;
    }
    const Tensor dy = of_losses.contiguous(), dx = at::empty_like(shares);
    const float *g = dy.const_data_ptr<float>(), *p = shares.const_data_ptr<float>();
    float* to = dx.mutable_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i, p += width, to += width) {
      for (int64_t c = 0; c < width; ++c) to[c] = g[i] * p[c];
      to[classes[i]] = g[i] * (p[classes[i]] - 1);
    }
    result[0] = dx;
    return result;
  }

  void release_variables() override {
    logits.reset_data();
    shares.reset();
  }

  std::string name() const override { return "CrossEntropy"; }
};

// Writes softmax of a row of logits and returns ln Σ exp.
double softmax(const float* x, int64_t width, float* shares) {
  const float most = *std::max_element(x, x + width);
  double sum = 0;
  for (int64_t c = 0; c < width; ++c) sum += shares[c] = std::exp(x[c] - most);
  const float part = static_cast<float>(1 / sum);
  for (int64_t c = 0; c < width; ++c) shares[c] *= part;
  return std::log(sum) + most;
}

}  // namespace

extern "C" {

// `*result` = ln Σ_c exp(x[i][c]) - x[i][classes[i]] for each row of x `[n, classes]`, which is of f32, on the
// processor and without gaps; all classes are there.
char* modl_cross_entropy(Tensor* x, const int64_t* classes, Tensor** result) {
  return told([&] {
    const int64_t n = x->size(0), width = x->size(1);
    const auto options = x->options().requires_grad(false);
    const Tensor shares = at::empty({n, width}, options);
    Tensor losses = at::empty({n}, options);
    const float* from = x->const_data_ptr<float>();
    float *p = shares.mutable_data_ptr<float>(), *to = losses.mutable_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i, from += width, p += width) {
      to[i] = static_cast<float>(softmax(from, width, p) - from[classes[i]]);
    }
    if (x->requires_grad() && at::GradMode::is_enabled()) {
      auto node = c10::make_intrusive<CrossEntropy>();
      node->set_next_edges({edge_of(*x)});
      node->logits = SavedVariable(*x, false);
      node->shares = shares;
      node->classes.assign(classes, classes + n);
      torch::autograd::set_history(losses, node);
    }
    *result = new Tensor(std::move(losses));
  });
}

}  // extern "C"
