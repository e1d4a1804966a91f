// Low-rank modules on the tokens that chose them, forward and backward, without a copy of a token;
// see src/grouped_low_rank.rs for what this is for.

#include <algorithm>
#include <atomic>
#include <vector>

#include <ATen/Parallel.h>

#include "node.h"
#include "thin_products.h"
#include "told.h"

namespace {

// Slots of one module that one thread takes at once.
constexpr int64_t kChunk = 64;
// Multiplications that are done before other threads are awake.
constexpr int64_t kAlone = 1 << 18;

struct Chunk {
  size_t module;
  int64_t first;
  int64_t last;
};

// Who works on what: the slots sorted by module, slot s being choice s mod k of token s ⁄ k.
struct Plan {
  int64_t k;
  std::vector<int64_t> slots;
  std::vector<int64_t> first;  // of each module, and behind the last
  std::vector<double> scale;
  std::vector<int64_t> rank;
  std::vector<int64_t> inner;  // where the thin results of each module start
  std::vector<Chunk> chunks;
  int64_t largest = 0;

  size_t modules() const { return rank.size(); }

  int64_t token(int64_t place) const { return slots[place] / k; }

  // Where the thin results of a chunk start.
  int64_t at(const Chunk& c) const { return inner[c.module] + (c.first - first[c.module]) * rank[c.module]; }

  // The rows of a chunk's tokens.
  template <typename T>
  void rows(T* base, int64_t width, const Chunk& c, T** to) const {
    for (int64_t i = c.first; i < c.last; ++i) *to++ = base + token(i) * width;
  }

  void divide() {
    inner.assign(1, 0);
    for (size_t e = 0; e < modules(); ++e) {
      inner.push_back(inner.back() + (first[e + 1] - first[e]) * rank[e]);
      largest = std::max(largest, rank[e]);
      for (int64_t i = first[e]; i < first[e + 1]; i += kChunk) {
        chunks.push_back({e, i, std::min(i + kChunk, first[e + 1])});
      }
    }
  }
};

// task(0, room), ..., task(n - 1, room) on libtorch's threads, each of which takes the next that nobody
// has and has room for so many numbers; on this one where all of them are soon done. Tasks call nothing
// of libtorch's.
template <typename T, typename Task>
void divided(int64_t n, int64_t work, int64_t room, const Task& task) {
  const int64_t threads = work < kAlone ? 1 : std::min<int64_t>(at::get_num_threads(), n);
  std::atomic<int64_t> next{0};
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const thin::Scratch<T> own(room);
      for (int64_t i = next++; i < n; i = next++) task(i, own.data());
    }
  };
  threads <= 1 ? run(0, 1) : at::parallel_for(0, threads, 1, run);
}

// task(first, width, room) on all columns, in pieces of whole cache lines, with room for so many rows
// of them: a column of the result belongs to one thread, which adds up in the order of the slots.
template <typename T, typename Task>
void by_columns(int64_t columns, int64_t work, int64_t rows, const Task& task) {
  const int64_t pieces = work < kAlone ? 1 : 2 * at::get_num_threads();
  const int64_t width = std::max<int64_t>(32, (columns / pieces + 31) / 32 * 32);
  const int64_t room = rows * (std::min(width, columns) + thin::widest_panel<T>);
  divided<T>((columns + width - 1) / width, work, room, [&](int64_t i, T* own) {
    task(i * width, std::min(width, columns - i * width), own);
  });
}

// y[token] += w f for the slots of a chunk, on all columns.
template <typename T, typename X>
void add_chunk(
    const Plan& plan,
    const Chunk& c,
    X* y,
    int64_t columns,
    const T* w,
    const std::vector<const T*>& f,
    bool turned,
    T* packed) {
  const int64_t r = plan.rank[c.module];
  X* rows[kChunk];
  thin::pack_here(f[c.module], turned, r, columns, 0, columns, packed);
  plan.rows(y, columns, c, rows);
  thin::add_here(rows, c.last - c.first, w + plan.at(c), r, packed, 0, columns);
}

// y[token] += w f for the slots of all modules, f being `[r, columns]`, or `[columns, r]` where it is
// turned; y's elements of `cleared` tokens start from 0.
template <typename T, typename X>
void add_all(
    const Plan& plan,
    X* y,
    int64_t cleared,
    int64_t columns,
    const T* w,
    const std::vector<const T*>& f,
    bool turned) {
  const int64_t work = plan.inner.back() * columns;
  by_columns<T>(columns, work, plan.largest, [&](int64_t first, int64_t width, T* packed) {
    for (int64_t t = 0; t < cleared; ++t) std::fill_n(y + t * columns + first, width, X(0));
    X* rows[kChunk];
    size_t module = plan.modules();
    for (const Chunk& c : plan.chunks) {
      const int64_t r = plan.rank[c.module];
      if (c.module != module) {
        module = c.module;
        thin::pack_here(f[module], turned, r, columns, first, width, packed);
      }
      plan.rows(y, columns, c, rows);
      thin::add_here(rows, c.last - c.first, w + plan.at(c), r, packed, first, width);
    }
  });
}

// wᵀ x of each module's slots, where there is somewhere to put it: `[r, columns]`, or turned,
// `[columns, r]`.
template <typename T, typename X>
void outer_all(
    const Plan& plan,
    const X* x,
    int64_t columns,
    const T* w,
    const std::vector<T*>& to,
    bool turned) {
  const int64_t work = plan.inner.back() * columns;
  by_columns<T>(columns, work, turned ? plan.largest : 0, [&](int64_t first, int64_t width, T* room) {
    const X* rows[kChunk];
    size_t module = plan.modules();
    for (size_t i = 0; i < plan.chunks.size(); ++i) {
      const Chunk& c = plan.chunks[i];
      if (!to[c.module]) continue;
      const int64_t r = plan.rank[c.module];
      T* const sum = turned ? room : to[c.module] + first;
      const int64_t stride = turned ? width : columns;
      const bool onto = c.module == module;
      module = c.module;
      plan.rows(x, columns, c, rows);
      thin::outer_here(rows, c.last - c.first, w + plan.at(c), r, first, width, sum, stride, onto);
      const bool last = i + 1 == plan.chunks.size() || plan.chunks[i + 1].module != module;
      if (turned && last) thin::turn_here(sum, width, r, width, to[module] + first * r, r);
    }
  });
}

// How many parts of the tokens are worked on side by side: as many as there are threads, since libtorch
// divides the operations before and after likewise, and a thread then finds in its cache what it left
// there. None where a part would pack the factors of most modules for a few slots.
int64_t parts_of(const Plan& plan, int64_t work) {
  const int64_t threads = work < kAlone ? 1 : at::get_num_threads();
  return plan.slots.size() >= 8 * plan.modules() * threads ? threads : 0;
}

// task(chunk, room) for the chunks of all modules within each part of the tokens. What is computed for a
// slot has the same bits in any chunk, and modules are in their order.
template <typename T, typename Task>
void by_tokens(const Plan& plan, int64_t tokens, int64_t parts, int64_t room, const Task& task) {
  const auto run = [&](int64_t begin, int64_t end) {
    const thin::Scratch<T> own(room);
    const auto before = [&](size_t e, int64_t part) {
      const auto from = plan.slots.begin() + plan.first[e], to = plan.slots.begin() + plan.first[e + 1];
      return std::lower_bound(from, to, tokens * part / parts * plan.k) - plan.slots.begin();
    };
    for (size_t e = 0; e < plan.modules(); ++e) {
      const int64_t last = before(e, end);
      for (int64_t i = before(e, begin); i < last; i += kChunk) {
        task(Chunk{e, i, std::min(i + kChunk, last)}, own.data());
      }
    }
  };
  parts == 1 ? run(0, 1) : at::parallel_for(0, parts, 1, run);
}

// Where the factors from the one behind `first` on are.
template <typename T>
std::vector<const T*> data_of(const std::vector<Tensor>& factors, size_t first, size_t n) {
  std::vector<const T*> all;
  for (size_t f = first; f < first + n; ++f) all.push_back(factors[f].template const_data_ptr<T>());
  return all;
}

// f(numbers of what is computed in, numbers of x): those of x, and floats for bf16, whose results are
// rounded where they are added up.
template <typename F>
void by_kind(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case at::kDouble: return f(double(), double());
    case at::kFloat: return f(float(), float());
    default: return f(float(), thin::Bf16());
  }
}

// The numbers of x as they lie.
template <typename X>
const X* rows_of(const Tensor& x) {
  return static_cast<const X*>(x.const_data_ptr());
}

// y += Σ α s B A x; `inner` gets A x for the backward pass.
template <typename T, typename X>
void forward(
    const Plan& plan,
    const Tensor& x,
    const Tensor& alpha,
    const std::vector<Tensor>& factors,
    Tensor& inner,
    Tensor& y) {
  const int64_t in = x.size(-1), out = y.size(-1);
  const X* xs = rows_of<X>(x);
  const T* alphas = alpha.const_data_ptr<T>();
  const size_t m = plan.modules();
  const auto downs = data_of<T>(factors, 0, m), ups = data_of<T>(factors, m, m);
  std::vector<T> weighed(plan.inner.back());
  X* ys = static_cast<X*>(y.mutable_data_ptr());
  T* us = inner.defined() ? inner.mutable_data_ptr<T>() : weighed.data();
  const auto inner_of = [&](const Chunk& c) {
    const int64_t r = plan.rank[c.module], at = plan.at(c);
    const X* rows[kChunk];
    plan.rows(xs, in, c, rows);
    thin::dots_here(rows, c.last - c.first, downs[c.module], r, in, us + at);
    for (int64_t s = 0; s < c.last - c.first; ++s) {
      const T a = alphas[plan.slots[c.first + s]] * static_cast<T>(plan.scale[c.module]);
      for (int64_t j = at + s * r; j < at + (s + 1) * r; ++j) weighed[j] = a * us[j];
    }
  };
  const int64_t work = plan.inner.back() * (in + out);
  if (const int64_t parts = parts_of(plan, work)) {
    const int64_t room = plan.largest * (out + thin::widest_panel<T>);
    by_tokens<T>(plan, x.size(0), parts, room, [&](const Chunk& c, T* packed) {
      inner_of(c);
      add_chunk(plan, c, ys, out, weighed.data(), ups, true, packed);
    });
    return;
  }
  divided<T>(plan.chunks.size(), work, 0, [&](int64_t i, T*) { inner_of(plan.chunks[i]); });
  add_all<T>(plan, ys, 0, out, weighed.data(), ups, true);
}

// Gradients of x, α, and all A and B, where they are defined.
template <typename T, typename X>
void backward(
    const Plan& plan,
    const Tensor& x,
    const Tensor& alpha,
    const std::vector<Tensor>& factors,
    const Tensor& inner,
    const Tensor& dy,
    Tensor& dx,
    Tensor& dalpha,
    std::vector<Tensor>& dfactors) {
  const int64_t in = x.size(-1), out = dy.size(-1);
  const X *xs = rows_of<X>(x), *dys = rows_of<X>(dy);
  const T *alphas = alpha.const_data_ptr<T>(), *us = inner.const_data_ptr<T>();
  X* dxs = dx.defined() ? static_cast<X*>(dx.mutable_data_ptr()) : nullptr;
  T* das = dalpha.defined() ? dalpha.mutable_data_ptr<T>() : nullptr;
  const size_t m = plan.modules();
  const auto downs = data_of<T>(factors, 0, m), ups = data_of<T>(factors, m, m);
  std::vector<T> hs(plan.inner.back()), weighed(plan.inner.back());
  const auto inner_of = [&](const Chunk& c, T* turned) {
    const int64_t r = plan.rank[c.module], at = plan.at(c);
    thin::turn_here(ups[c.module], r, out, r, turned, out);
    const X* rows[kChunk];
    plan.rows(dys, out, c, rows);
    thin::dots_here(rows, c.last - c.first, turned, r, out, hs.data() + at);
    const T scale = static_cast<T>(plan.scale[c.module]);
    for (int64_t s = 0; s < c.last - c.first; ++s) {
      const int64_t slot = plan.slots[c.first + s];
      const T a = alphas[slot] * scale;
      T da = 0;
      for (int64_t j = at + s * r; j < at + (s + 1) * r; ++j) {
        da += us[j] * hs[j];
        hs[j] *= a;
        weighed[j] = a * us[j];
      }
      if (das) das[slot] = da * scale;
    }
  };
  const int64_t work = plan.inner.back() * (in + out);
  const int64_t parts = parts_of(plan, work);
  if (parts > 0) {
    const int64_t room = plan.largest * (std::max(in, out) + thin::widest_panel<T>);
    if (dxs) dx.zero_();
    by_tokens<T>(plan, x.size(0), parts, room, [&](const Chunk& c, T* own) {
      inner_of(c, own);
      if (dxs) add_chunk(plan, c, dxs, in, hs.data(), downs, false, own);
    });
  } else {
    divided<T>(plan.chunks.size(), work, plan.largest * out, [&](int64_t i, T* turned) {
      inner_of(plan.chunks[i], turned);
    });
  }
  if (dxs && parts == 0) {
    add_all<T>(plan, dxs, dx.size(0), in, hs.data(), downs, false);
  }
  std::vector<T*> to_downs, to_ups;
  for (size_t f = 0; f < 2 * m; ++f) {
    const Tensor& t = dfactors[f];
    (f < m ? to_downs : to_ups).push_back(t.defined() ? t.mutable_data_ptr<T>() : nullptr);
  }
  outer_all<T>(plan, xs, in, hs.data(), to_downs, false);
  outer_all<T>(plan, dys, out, weighed.data(), to_ups, true);
}

// t in a kind that it mostly has: asking libtorch for nothing is felt with all factors.
Tensor in_kind(const Tensor& t, at::ScalarType kind) { return t.scalar_type() == kind ? t : t.to(kind); }

// Factors in the kind that is computed in, which is that of α.
std::vector<Tensor> as_computed(const std::vector<Tensor>& factors, const Tensor& alpha) {
  std::vector<Tensor> all;
  for (const Tensor& f : factors) all.push_back(in_kind(f, alpha.scalar_type()));
  return all;
}

// Inputs are what is added to, x `[tokens, in]`, α `[slots]`, all A, and all B.
struct GroupedLowRank : public Node {
  Plan plan;
  SavedVariable x, alpha;
  std::vector<SavedVariable> factors;
  Tensor inner;
  std::vector<int64_t> y_size;

  variable_list apply(variable_list&& gradients) override {
    variable_list result(num_outputs());
    if (!gradients[0].defined()) return result;
    need_kept(inner.defined());
    result[0] = gradients[0];
    const Tensor x = this->x.unpack(), alpha = this->alpha.unpack();
    std::vector<Tensor> factors;
    for (const SavedVariable& f : this->factors) factors.push_back(f.unpack());
    const Tensor dy = gradients[0].reshape({x.size(0), y_size.back()});
    if (at::GradMode::is_enabled()) {
      differentiable(x, alpha, factors, dy, result);
      return result;
    }
    if (task_should_compute_output(1)) result[1] = at::empty_like(x);
    if (task_should_compute_output(2)) result[2] = at::zeros_like(alpha);
    const std::vector<Tensor> own = as_computed(factors, alpha);
    std::vector<Tensor> dfactors = room_for_gradients(own);
    const Tensor rows = dy.contiguous();
    by_kind(x, [&](auto of_sums, auto of_rows) {
      using T = decltype(of_sums);
      using X = decltype(of_rows);
      backward<T, X>(plan, x, alpha, own, inner, rows, result[1], result[2], dfactors);
    });
    for (size_t f = 0; f < factors.size(); ++f) {
      if (dfactors[f].defined()) result[3 + f] = in_kind(dfactors[f], factors[f].scalar_type());
    }
    return result;
  }

  // A tensor for each gradient that is wanted of a factor, all in one piece of memory: that many
  // pieces would take longer to find and to free than to fill.
  std::vector<Tensor> room_for_gradients(const std::vector<Tensor>& factors) {
    std::vector<Tensor> all(factors.size());
    std::vector<int64_t> starts;
    int64_t end = 0;
    for (size_t f = 0; f < factors.size(); ++f) {
      starts.push_back(end);
      if (!task_should_compute_output(3 + f) || !used(f)) continue;
      end += (factors[f].numel() + 15) / 16 * 16;
      all[f] = factors[f];
    }
    const Tensor whole = at::empty({end}, factors[0].options().requires_grad(false));
    for (size_t f = 0; f < factors.size(); ++f) {
      if (!all[f].defined()) continue;
      all[f] = at::detail::make_tensor<c10::TensorImpl>(
          c10::Storage(whole.storage()), whole.key_set(), whole.dtype());
      all[f].unsafeGetTensorImpl()->set_sizes_and_strides(
          factors[f].sizes(), factors[f].strides(), starts[f]);
    }
    return all;
  }

  // Whether anybody chose the module of a factor.
  bool used(size_t factor) const {
    const size_t e = factor % plan.modules();
    return plan.first[e] < plan.first[e + 1];
  }

  // The same in libtorch's operations, where gradients of gradients are wanted.
  void differentiable(
      const Tensor& x,
      const Tensor& alpha,
      const std::vector<Tensor>& factors,
      const Tensor& dy,
      variable_list& result) const {
    const size_t m = plan.modules();
    const auto kind = alpha.scalar_type();
    Tensor dx = at::zeros_like(x, x.options().dtype(kind));
    result[2] = at::zeros_like(alpha);
    for (size_t e = 0; e < m; ++e) {
      if (!used(e)) continue;
      const std::vector<int64_t> own(
          plan.slots.begin() + plan.first[e], plan.slots.begin() + plan.first[e + 1]);
      const Tensor slots = at::tensor(own, at::kLong);
      const Tensor tokens = slots.div(plan.k, "floor");
      const Tensor xs = x.index_select(0, tokens).to(kind), dys = dy.index_select(0, tokens).to(kind);
      const Tensor down = factors[e].to(kind), up = factors[m + e].to(kind);
      const Tensor a = alpha.index_select(0, slots).mul(plan.scale[e]).unsqueeze(1);
      const Tensor u = xs.matmul(down.t()), h = dys.matmul(up);
      dx = dx.index_add(0, tokens, (a * h).matmul(down));
      result[2] = result[2].index_add(0, slots, (u * h).sum(1).mul(plan.scale[e]));
      result[3 + e] = (a * h).t().matmul(xs).to(factors[e].scalar_type());
      result[3 + m + e] = dys.t().matmul(a * u).to(factors[m + e].scalar_type());
    }
    result[1] = dx.to(x.scalar_type());
  }

  void release_variables() override {
    x.reset_data();
    alpha.reset_data();
    for (SavedVariable& f : factors) f.reset_data();
    inner.reset();
  }

  std::string name() const override { return "GroupedLowRank"; }
};

// Whether nobody else has or will look at this memory, so that it can be written.
bool unshared(const Tensor& t) {
  return t.use_count() == 1 && t.storage().use_count() == 1 && t.is_contiguous();
}

}  // namespace

extern "C" {

// `*result` = y + Σ α s B A x, in y's memory where nobody else has it. α is of the kind of x, or of floats
// where that is bf16, and factors of either. Slots are sorted by module, module e having those from
// `first[e]` to `first[e + 1]`; what its A and B, which are contiguous, are multiplied by is `scales[e]`.
char* modl_grouped_low_rank(
    Tensor* y,
    Tensor* x,
    Tensor* alpha,
    int64_t k,
    const int64_t* slots,
    const int64_t* first,
    size_t modules,
    Tensor** factors,
    const double* scales,
    Tensor** result) {
  return told([&] {
    Plan plan;
    plan.k = k;
    plan.slots.assign(slots, slots + first[modules]);
    plan.first.assign(first, first + modules + 1);
    plan.scale.assign(scales, scales + modules);
    std::vector<Tensor> all;
    bool recorded = y->requires_grad() || x->requires_grad() || alpha->requires_grad();
    for (size_t f = 0; f < 2 * modules; ++f) {
      all.push_back(*factors[f]);
      recorded |= factors[f]->requires_grad();
    }
    recorded &= at::GradMode::is_enabled();
    for (size_t e = 0; e < modules; ++e) plan.rank.push_back(all[e].size(0));
    plan.divide();
    c10::intrusive_ptr<GroupedLowRank> node;
    Tensor inner;
    if (recorded) {
      inner = at::empty({plan.inner.back()}, alpha->options().requires_grad(false));
      node = c10::make_intrusive<GroupedLowRank>();
      edge_list next;
      for (const Tensor* t : {y, x, alpha}) next.push_back(edge_of(*t));
      for (const Tensor& f : all) {
        next.push_back(edge_of(f));
        node->factors.emplace_back(f, false);
      }
      node->x = SavedVariable(*x, false);
      node->alpha = SavedVariable(*alpha, false);
      node->inner = inner;
      node->y_size = y->sizes().vec();
      node->set_next_edges(std::move(next));
    }
    const bool unseen = unshared(*y);
    Tensor sum = y->variable_data();  // The same memory.
    if (!unseen) {
      sum = at::empty(y->sizes(), sum.options()).copy_(sum);
    }
    {
      const at::NoGradGuard guard;
      const std::vector<Tensor> own = as_computed(all, *alpha);
      by_kind(*x, [&](auto of_sums, auto of_rows) {
        forward<decltype(of_sums), decltype(of_rows)>(plan, *x, *alpha, own, inner, sum);
      });
    }
    if (recorded) {
      node->plan = std::move(plan);
      torch::autograd::set_history(sum, node);
    }
    *result = new Tensor(std::move(sum));
  });
}

}  // extern "C"
