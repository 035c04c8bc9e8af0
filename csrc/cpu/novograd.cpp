// NovoGrad's step over all parameters on the CPU, in fp32. This file checks arguments, starts threads, merges sums of
// squares in a fixed order, and computes the scalars of each parameter. The loops are in isa/novograd.cpp.
#include "novograd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "tasks.h"

namespace jf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kRun = 65536;  // maximum number of elements of a task; the sums of tasks are merged in a fixed order
constexpr int kColumns = 8;      // columns of the settings; kernels/novograd/operands.py names them
enum { kLr, kBeta1, kShare, kBeta2, kRest2, kEps, kDecay, kWeight };

// ---- arguments ----
bool dense(const Tensor& x) {  // whether the elements fill their memory without gaps, in any order
  int64_t span = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) == 0) return true;
    span += (x.size(i) - 1) * x.stride(i);
  }
  return span == x.numel();
}

// The data of `x`, which must have the memory order of `like`. Strides of dimensions of size 1 do not matter.
float* data_of(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float, "novograd (cpu): ", name,
                  " must be float32 tensors on the CPU; others are for backend=\"reference\"");
  bool same = x.dim() == like.dim() && dense(x);
  for (int64_t i = 0; same && i < x.dim(); ++i) {
    same = x.size(i) == like.size(i) && (x.size(i) < 2 || x.stride(i) == like.stride(i));
  }
  STD_TORCH_CHECK(same, "novograd (cpu): ", name, " must have the shape and the memory order of their parameters, ",
                  "without gaps; use torch.empty_like(parameter).copy_(...)");
  return static_cast<float*>(x.data_ptr());
}

float* scalar_of(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.numel() == 1, "novograd (cpu): ", name,
                  " must be one float32 on the CPU");
  return static_cast<float*>(x.data_ptr());
}

double number_of(const char* name, const OptionalTensor& x, double otherwise) {
  return x ? *scalar_of(name, *x) : otherwise;
}

void check_length(const char* name, const Tensors& of, size_t wanted) {
  STD_TORCH_CHECK(of.size() == wanted, "novograd (cpu): ", wanted, " parameters want as many ", name, ", got ",
                  of.size());
}

// ---- the step ----
struct Entry {
  float *g, *m, *p, *average, *square;
  int64_t n, first_run;
  const double* settings;
};

struct Run {
  int64_t entry, begin, end;
};

std::vector<Run> runs_of(std::vector<Entry>& entries) {
  std::vector<Run> runs;
  for (size_t i = 0; i < entries.size(); ++i) {
    entries[i].first_run = runs.size();
    for (int64_t begin = 0; begin < entries[i].n; begin += kRun) {
      runs.push_back({int64_t(i), begin, std::min(entries[i].n, begin + kRun)});
    }
  }
  return runs;
}

std::vector<Entry> entries_of(const Tensors& grads, const Tensors& params, const Tensors& exp_avgs,
                              const Tensors& exp_avg_sqs, const Tensors& averages, const Tensor& groups,
                              const Tensor& settings) {
  const size_t count = params.size();
  check_length("gradients", grads, count);
  check_length("exp_avgs", exp_avgs, count);
  check_length("exp_avg_sqs", exp_avg_sqs, count);
  if (!averages.empty()) check_length("averages", averages, count);
  STD_TORCH_CHECK(settings.is_cpu() && settings.scalar_type() == ScalarType::Double && settings.dim() == 2 &&
                      settings.size(0) > 0 && settings.size(1) == kColumns && settings.is_contiguous(),
                  "novograd (cpu): settings must be a contiguous float64 tensor (groups, ", kColumns, ")");
  STD_TORCH_CHECK(groups.is_cpu() && groups.scalar_type() == ScalarType::Long && groups.is_contiguous() &&
                      groups.numel() == int64_t(count),
                  "novograd (cpu): groups must be an int64 tensor with a row for each parameter");
  const auto* rows = static_cast<const double*>(settings.data_ptr());
  const auto* group = static_cast<const int64_t*>(groups.data_ptr());
  std::vector<Entry> entries;
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(group[i] >= 0 && group[i] < settings.size(0), "novograd (cpu): the settings have no row ", group[i]);
    float* average = averages.empty() ? nullptr : data_of("averages", averages[i], params[i]);
    entries.push_back({data_of("gradients", grads[i], params[i]), data_of("exp_avgs", exp_avgs[i], params[i]),
                       data_of("parameters", params[i], params[i]), average,
                       scalar_of("exp_avg_sqs", exp_avg_sqs[i]), params[i].numel(), 0,
                       rows + group[i] * kColumns});
  }
  return entries;
}

void average_all(const Tensors& lives, const Tensors& averages, float weight) {
  check_length("averages", averages, lives.size());
  std::vector<Entry> entries;
  for (size_t i = 0; i < lives.size(); ++i) {
    entries.push_back({nullptr, nullptr, data_of("lives", lives[i], lives[i]),
                       data_of("averages", averages[i], lives[i]), nullptr, lives[i].numel(), 0, nullptr});
  }
  const std::vector<Run> runs = runs_of(entries);
  const auto average = JF_DISPATCH(novograd_average);
  run_tasks(runs.size(), [&](int64_t i) {
    const Run& run = runs[i];
    const Entry& e = entries[run.entry];
    average(e.p + run.begin, e.average + run.begin, run.end - run.begin, weight);
  });
}

void novograd_step(const Tensors& grads, const Tensors& params, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                   const Tensors& averages, const Tensor& groups, const Tensors& lives, const Tensors& live_averages,
                   const Tensor& settings, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                   double clip_norm, bool guard, const Tensor& outcome) {
  std::vector<Entry> entries = entries_of(grads, params, exp_avgs, exp_avg_sqs, averages, groups, settings);
  const float weight = static_cast<float>(static_cast<const double*>(settings.data_ptr())[kWeight]);
  STD_TORCH_CHECK(outcome.numel() == 2 && outcome.is_contiguous() && outcome.scalar_type() == ScalarType::Float,
                  "novograd (cpu): the outcome must be two float32");
  const double inverse = 1.0 / number_of("grad_scale", grad_scale, 1.0);

  const std::vector<Run> runs = runs_of(entries);
  std::vector<double> partials(runs.size());
  const auto squares = JF_DISPATCH(novograd_squares);
  run_tasks(runs.size(), [&](int64_t i) {
    partials[i] = squares(entries[runs[i].entry].g + runs[i].begin, runs[i].end - runs[i].begin);
  });
  std::vector<double> sums(entries.size(), 0.0);
  double total = 0.0;
  for (size_t i = 0; i < runs.size(); ++i) sums[runs[i].entry] += partials[i];
  for (double sum : sums) total += sum;
  const double norm = std::sqrt(total) * inverse;
  const bool bad = number_of("found_inf", found_inf, 0.0) != 0.0 || (guard && !std::isfinite(norm));
  const double clip = clip_norm > 0.0 ? std::min(1.0, clip_norm / (norm + 1e-6)) : 1.0;

  std::vector<float> factors(entries.size());
  for (size_t i = 0; i < entries.size() && !bad; ++i) {
    const Entry& e = entries[i];
    const double square = sums[i] * inverse * inverse * clip * clip, old = *e.square, *s = e.settings;
    *e.square = static_cast<float>(old == 0.0 || s[kBeta2] == 0.0 ? square : s[kBeta2] * old + s[kRest2] * square);
    factors[i] = static_cast<float>(s[kShare] * inverse * clip / (std::sqrt(double(*e.square)) + s[kEps]));
  }
  const auto update = JF_DISPATCH(novograd_update);
  const auto average = JF_DISPATCH(novograd_average);
  run_tasks(bad && averages.empty() ? 0 : runs.size(), [&](int64_t i) {
    const int64_t begin = runs[i].begin, n = runs[i].end - begin;
    const Entry& e = entries[runs[i].entry];
    float* const mean = e.average ? e.average + begin : nullptr;
    if (bad) {
      average(e.p + begin, mean, n, weight);
      return;
    }
    const double* s = e.settings;
    update({e.g + begin, e.m + begin, e.p + begin, mean, n, float(s[kBeta1]), factors[runs[i].entry],
            float(s[kDecay]), float(s[kLr]), weight});
  });
  average_all(lives, live_averages, weight);
  auto* const told = static_cast<float*>(outcome.data_ptr());
  told[0] = static_cast<float>(norm), told[1] = bad ? 1.0f : 0.0f;
}

}  // namespace
}  // namespace jf

STABLE_TORCH_LIBRARY_FRAGMENT(jasper_fast_cpu, m) {
  m.def(
      "novograd_step(Tensor[] grads, Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] averages, Tensor groups, Tensor[] lives, Tensor(e!)[] live_averages, Tensor settings, "
      "Tensor? grad_scale, Tensor? found_inf, float clip_norm, bool guard, Tensor(f!) outcome) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(jasper_fast_cpu, CPU, m) { m.impl("novograd_step", TORCH_BOX(&jf::novograd_step)); }
