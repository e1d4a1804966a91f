// Branches of a computation on libtorch's own threads, forward and backward. libtorch's C interface
// has neither parallel regions nor functions with a backward pass of their own; see
// src/side_by_side.rs for what this is for.

#include <algorithm>
#include <atomic>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include "node.h"
#include "told.h"

namespace {

using torch::autograd::Engine;

// task(0), ..., task(n - 1): each thread takes the next one that nobody has. Operations within a
// task have one thread, since they are in a parallel region.
template <typename Task>
void on_threads(size_t n, const Task& task) {
  const at::ThreadLocalState state;
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(n));
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const at::ThreadLocalStateGuard guard(state);
    for (int64_t thread = begin; thread < end; ++thread) {
      for (size_t i = next++; i < n; i = next++) {
        task(i);
      }
    }
  });
}

struct Branch {
  Edge y;                      // where its backward pass starts
  Edge x;                      // its rows of the input
  std::vector<Edge> params;    // its own parameters
  size_t first_param;          // the input of the node that the first of them stands for
  int64_t first_row;
  int64_t rows;
};

// y = [branch 0; branch 1; ...]. Inputs are x, then the parameters of all branches in their order.
struct SideBySide : public Node {
  std::vector<Branch> branches;  // the largest first, in which order they are done soonest
  std::vector<int64_t> x_size;
  at::TensorOptions x_options;

  variable_list apply(variable_list&& gradients) override {
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "modules that were computed side by side have no gradient of a gradient");
    variable_list result(num_outputs());
    const at::Tensor& dy = gradients[0];
    if (!dy.defined()) {
      return result;
    }
    need_kept(!branches.empty());
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    const bool of_x = task_should_compute_output(0);
    if (of_x) {
      result[0] = at::empty(x_size, x_options);
    }
    on_threads(branches.size(), [&](size_t i) {
      const Branch& branch = branches[i];
      edge_list wanted;
      std::vector<size_t> places;
      if (of_x) {
        wanted.push_back(branch.x);
        places.push_back(0);
      }
      for (size_t p = 0; p < branch.params.size(); ++p) {
        const size_t place = branch.first_param + p;
        if (task_should_compute_output(place)) {
          wanted.push_back(branch.params[p]);
          places.push_back(place);
        }
      }
      const at::Tensor dx =
          of_x ? result[0].narrow(0, branch.first_row, branch.rows) : at::Tensor();
      if (!branch.y.is_valid() || wanted.empty()) {
        if (of_x) dx.zero_();
        return;
      }
      variable_list found = Engine::get_default_engine().execute(
          {branch.y}, {dy.narrow(0, branch.first_row, branch.rows)}, keep, false, false, wanted);
      for (size_t w = 0; w < found.size(); ++w) {
        if (places[w] != 0) {
          result[places[w]] = std::move(found[w]);
        } else if (found[w].defined()) {
          dx.copy_(found[w]);
        } else {
          dx.zero_();
        }
      }
    });
    return result;
  }

  void release_variables() override {
    branches.clear();
  }

  std::string name() const override {
    return "SideBySide";
  }
};

}  // namespace

extern "C" {

bool modl_grad_enabled() {
  return at::GradMode::is_enabled();
}

char* modl_on_threads(size_t n, void (*task)(void*, size_t), void* data) {
  return told([&] { on_threads(n, [&](size_t i) { task(data, i); }); });
}

// Gives `y`, which holds what `n` branches gave below one another, the gradients of these. Branch i
// took the rows from `first_rows[i]` to `first_rows[i + 1]` of `x` as the leaf `xs[i]`, made `ys[i]`,
// and has the leaves `own[j]` in the place of `params[j]` for j from `first_params[i]` to
// `first_params[i + 1]`.
char* modl_join(
    at::Tensor* y,
    at::Tensor* x,
    size_t n,
    at::Tensor** xs,
    at::Tensor** ys,
    const int64_t* first_rows,
    at::Tensor** params,
    at::Tensor** own,
    const size_t* first_params) {
  return told([&] {
    auto node = c10::make_intrusive<SideBySide>();
    edge_list next;
    next.push_back(edge_of(*x));
    node->x_size = x->sizes().vec();
    node->x_options = x->options();
    for (size_t i = 0; i < n; ++i) {
      const int64_t rows = first_rows[i + 1] - first_rows[i];
      Branch branch{edge_of(*ys[i]), edge_of(*xs[i]), {}, 1 + first_params[i], first_rows[i], rows};
      for (size_t j = first_params[i]; j < first_params[i + 1]; ++j) {
        next.push_back(edge_of(*params[j]));
        branch.params.push_back(edge_of(*own[j]));
      }
      node->branches.push_back(std::move(branch));
    }
    std::stable_sort(
        node->branches.begin(), node->branches.end(), [](const Branch& a, const Branch& b) {
          return a.rows > b.rows;
        });
    node->set_next_edges(std::move(next));
    torch::autograd::set_history(*y, node);
  });
}

}  // extern "C"
