// What functions with a backward pass of their own are written with.

#pragma once

#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

using at::Tensor;
using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Where the gradient of a tensor goes; nowhere for one that has none.
inline Edge edge_of(const Tensor& t) {
  return t.requires_grad() ? torch::autograd::impl::gradient_edge(t) : Edge();
}

// Refuses a second backward pass, for which nothing is left.
inline void need_kept(bool kept) {
  TORCH_CHECK(kept, "the backward pass of this graph has been run, and it was not kept");
}
