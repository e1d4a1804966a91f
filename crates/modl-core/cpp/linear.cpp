// Linear layers by products of our own, forward and backward; see src/linear.rs for where.

#include <algorithm>
#include <type_traits>
#include <vector>

#include <ATen/Parallel.h>

#include "node.h"
#include "products.h"
#include "told.h"

#if defined(__x86_64__)

namespace {

// Multiplications for which one more thread is worth being called.
constexpr int64_t kOfThread = 1 << 19;
// Narrower sums are left to libtorch's BLAS, which does no worse, as is a single token.
constexpr int64_t kNarrow = 24;
// So are gradients of fewer tokens.
constexpr int64_t kFewTokens = 4;
// A gradient with so many numbers has left the second cache before anybody reads it.
constexpr int64_t kStreamed = 1 << 17;
// Rows whose sum needs no care for the last digits.
constexpr int64_t kShortSum = 64;

// task(i, rows, j, columns) for parts of a result `[m, n]`, cut across its longer side, where each but the last is
// of whole steps, on libtorch's threads.
template <typename Task>
void divided(int64_t m, int64_t n, int64_t row_step, int64_t column_step, int64_t work, const Task& task) {
  const bool by_rows = m >= n;
  const int64_t size = by_rows ? m : n, step = by_rows ? row_step : column_step;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t steps = products::pieces(size, step);
  const int64_t parts = std::max<int64_t>(1, std::min({threads, steps, work / kOfThread}));
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = products::part(steps, i, parts) * step;
      const int64_t count = std::min(size, products::part(steps, i + 1, parts) * step) - first;
      by_rows ? task(first, count, 0, n) : task(0, m, first, count);
    }
  };
  parts == 1 ? run(0, 1) : at::parallel_for(0, parts, 1, run);
}

// f with what is multiplied: numbers of f32 or of bf16.
template <typename F>
void by_kind(const Tensor& t, const F& f) {
  t.scalar_type() == at::kFloat ? f(products::F32()) : f(products::Bf16());
}

// f with the numbers of `to`, or of a tensor of f32 that then becomes `to`: sums of bf16 are rounded once.
template <typename Kind, typename F>
void summed_in(const Tensor& to, bool at_once, const F& f) {
  if (Kind::kInWord == 1 || at_once) return f(static_cast<typename Kind::Number*>(to.mutable_data_ptr()));
  const Tensor sums = at::empty(to.sizes(), to.options().dtype(at::kFloat));
  f(sums.mutable_data_ptr<float>());
  to.copy_(sums);
}

// y = x wᵀ + b, x `[tokens, k]` and w `[n, k]`; with `relu`, for f32 alone, what is below 0 becomes 0.
void forward(const Tensor& x, const Tensor& w, const Tensor* bias, bool relu, const Tensor& y) {
  by_kind(x, [&](auto kind) {
    using Kind = decltype(kind);
    const int64_t n = w.size(0), words = w.size(1) / Kind::kInWord, tokens = x.numel() / w.size(1);
    const auto* xs = static_cast<const float*>(x.const_data_ptr());
    const auto* ws = static_cast<const float*>(w.const_data_ptr());
    summed_in<Kind>(y, words <= products::kWidth, [&](auto* ys) {
      using Out = std::remove_pointer_t<decltype(ys)>;
      const Tensor of_out = bias && sizeof(Out) != bias->element_size() ? bias->to(at::kFloat) : Tensor();
      const Tensor* own = of_out.defined() ? &of_out : bias;
      const auto* b = own ? static_cast<const Out*>(own->const_data_ptr()) : nullptr;
      const auto part = [&](int64_t t, int64_t rows, int64_t i, int64_t columns) {
        Out* to = ys + t * n + i;
        const Out* of_bias = b ? b + i : nullptr;
        products::linear<Kind>(rows, columns, words, xs + t * words, ws + i * words, of_bias, to, n);
        if constexpr (std::is_same_v<Kind, products::F32>) {
          for (int64_t r = 0; r < rows && relu; ++r, to += n) products::relu(to, columns);
        }
      };
      divided(tokens, n, products::kPanel, products::kRows, tokens * n * words, part);
    });
  });
}

// a b in `c`, for a `[m, k]`, whose rows and columns are so far apart, and b `[k, n]`, which lies without gaps as
// c does.
void product(
    int64_t m,
    int64_t n,
    int64_t k,
    const Tensor& a,
    int64_t rows_apart,
    int64_t columns_apart,
    const Tensor& b,
    bool stream,
    const Tensor& c) {
  by_kind(a, [&](auto kind) {
    using Kind = decltype(kind);
    using Number = typename Kind::Number;
    const auto* of_b = static_cast<const Number*>(b.const_data_ptr());
    const products::Matrix<Number> all{
        static_cast<const Number*>(a.const_data_ptr()), rows_apart, columns_apart};
    summed_in<Kind>(c, k <= Kind::kInWord * Kind::kBlockSum, [&](auto* cs) {
      const auto part = [&](int64_t i, int64_t rows, int64_t j, int64_t columns) {
        products::product<Kind>(rows, columns, k, all.from(i, 0), of_b + j, n, cs + i * n + j, n, stream);
      };
      divided(m, n, products::kRows, products::kPanel, m * n * k / Kind::kInWord, part);
    });
  });
}

// dy w in the shape of x, for dy `[tokens, n]` and w `[n, k]`.
Tensor gradient_of_x(const Tensor& dy, const Tensor& w, at::IntArrayRef x_size) {
  const int64_t n = w.size(0), k = w.size(1);
  const Tensor dx = at::empty(x_size, dy.options());
  product(dy.numel() / n, k, n, dy, n, 1, w, false, dx);
  return dx;
}

// dyᵀ x, for dy `[tokens, n]` and x `[tokens, k]`.
Tensor gradient_of_w(const Tensor& dy, const Tensor& x) {
  const int64_t n = dy.size(-1), k = x.size(-1);
  const Tensor dw = at::empty({n, k}, dy.options());
  product(n, k, dy.numel() / n, dy, 1, n, x, n * k >= kStreamed, dw);
  return dw;
}

// dy where y is above 0, and 0 elsewhere; both without gaps.
Tensor through_relu(const Tensor& dy, const Tensor& y) {
  const Tensor masked = at::empty_like(dy);
  const float *of_dy = dy.const_data_ptr<float>(), *of_y = y.const_data_ptr<float>();
  float* to = masked.mutable_data_ptr<float>();
  at::parallel_for(0, dy.numel(), at::internal::GRAIN_SIZE, [&](int64_t i, int64_t end) {
    products::through_relu(of_dy + i, of_y + i, end - i, to + i);
  });
  return masked;
}

// The sums of the columns of dy `[tokens, n]`.
Tensor gradient_of_bias(const Tensor& dy) {
  const int64_t n = dy.size(-1), tokens = dy.numel() / n;
  if (tokens > kShortSum || dy.scalar_type() != at::kFloat) return dy.reshape({tokens, n}).sum(0);
  const Tensor sums = at::empty({n}, dy.options());
  products::column_sums(dy.const_data_ptr<float>(), tokens, n, sums.mutable_data_ptr<float>());
  return sums;
}

// Whether rows are words of 32 bits.
bool whole_words(const Tensor& t) { return t.scalar_type() == at::kFloat || t.size(-1) % 2 == 0; }

// Inputs are x `[..., k]`, w `[n, k]`, and the bias where there is one.
struct Linear : public Node {
  SavedVariable x, w;  // where the gradient of the other is wanted
  SavedVariable y;     // where what was below 0 became 0
  std::vector<int64_t> x_size;
  bool relu = false;

  variable_list apply(variable_list&& gradients) override {
    variable_list result(num_outputs());
    if (!gradients[0].defined()) return result;
    const bool of_bias = num_outputs() > 2 && task_should_compute_output(2);
    const Tensor y = relu ? this->y.unpack(c10::intrusive_ptr<Node>::reclaim_copy(this)) : Tensor();
    if (at::GradMode::is_enabled()) {
      const Tensor of_y = relu ? at::threshold_backward(gradients[0], y, 0) : gradients[0];
      const Tensor dy = of_y.reshape({-1, of_y.size(-1)});
      if (task_should_compute_output(0)) result[0] = dy.mm(w.unpack()).reshape(x_size);
      if (task_should_compute_output(1)) result[1] = dy.t().mm(x.unpack().reshape({-1, x_size.back()}));
      if (of_bias) result[2] = dy.sum(0);
      return result;
    }
    Tensor dy = gradients[0].contiguous();
    if (relu) dy = through_relu(dy, y);
    const bool few = dy.numel() / dy.size(-1) < kFewTokens;
    if (task_should_compute_output(0)) {
      const Tensor w = this->w.unpack();
      result[0] = few || !whole_words(dy) ? dy.matmul(w) : gradient_of_x(dy, w, x_size);
    }
    if (task_should_compute_output(1)) {
      const Tensor x = this->x.unpack();
      const auto rows = [](const Tensor& t) { return t.reshape({-1, t.size(-1)}); };
      result[1] = few ? rows(dy).t().mm(rows(x)) : gradient_of_w(dy, x);
    }
    if (of_bias) result[2] = gradient_of_bias(dy);
    return result;
  }

  void release_variables() override {
    x.reset_data();
    w.reset_data();
    y.reset_data();
  }

  std::string name() const override { return "Linear"; }
};

bool plain(const Tensor& t, at::ScalarType kind) {
  return t.is_cpu() && t.scalar_type() == kind && t.is_contiguous();
}

bool suits(const Tensor& x, const Tensor& w, const Tensor* bias, bool relu) {
  const auto kind = x.scalar_type();
  const bool has = kind == at::kFloat ? has_avx512() : kind == at::kBFloat16 && has_bf16() && !relu;
  return has && plain(x, kind) && plain(w, kind) && w.dim() == 2 && x.dim() >= 1 && x.size(-1) == w.size(1) &&
      whole_words(w) && w.size(0) > 1 && w.size(1) >= kNarrow && x.numel() > x.size(-1) &&
      (!bias || (plain(*bias, kind) && bias->dim() == 1 && bias->size(0) == w.size(0)));
}

}  // namespace

#endif

extern "C" {

// `*result` = x wᵀ + bias, which may be null, with 0 for what is below it where `relu` says so; null where
// libtorch's own way is to be taken.
char* modl_linear(Tensor* x, Tensor* w, Tensor* bias, bool relu, Tensor** result) {
  *result = nullptr;
#if defined(__x86_64__)
  return told([&] {
    if (!suits(*x, *w, bias, relu)) return;
    std::vector<int64_t> shape = x->sizes().vec();
    shape.back() = w->size(0);
    Tensor y = at::empty(shape, x->options().requires_grad(false));
    forward(*x, *w, bias, relu, y);
    const bool asked = x->requires_grad() || w->requires_grad() || (bias && bias->requires_grad());
    if (asked && at::GradMode::is_enabled()) {
      auto node = c10::make_intrusive<Linear>();
      edge_list next;
      for (const Tensor* t : {x, w, bias}) {
        if (t) next.push_back(edge_of(*t));
      }
      if (w->requires_grad()) node->x = SavedVariable(*x, false);
      if (x->requires_grad()) node->w = SavedVariable(*w, false);
      node->x_size = x->sizes().vec();
      node->set_next_edges(std::move(next));
      torch::autograd::set_history(y, node);
      node->relu = relu;
      if (relu) node->y = SavedVariable(y, true);
    }
    *result = new Tensor(std::move(y));
  });
#else
  return nullptr;
#endif
}

}  // extern "C"
