// mixkd_fast::kd_loss on CUDA: arguments -> Job, the choice of a path, registration.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "kd_launch.h"
#include "kd_stream.h"

namespace mixkd::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::F32;
    case ScalarType::BFloat16: return Dtype::BF16;
    case ScalarType::Half: return Dtype::F16;
    default:
      STD_TORCH_CHECK(false, name,
                      " must be float32, bfloat16 or float16 for the cuda backend; float64 has the reference backend");
  }
}

void check_device(const char* name, const std::optional<Tensor>& tensor, const Tensor& student_logits) {
  if (!tensor.has_value()) return;
  STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == student_logits.get_device_index(), name,
                  " must be on the device of student_logits");
}

template <typename T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return static_cast<const T*>(data_or_null(tensor));
}

int checked_width(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.size(1) < (int64_t(1) << 30), name, " has too many classes: ", tensor.size(1));
  return static_cast<int>(tensor.size(1));
}

DeviceLimits limits_of(int device) {
  DeviceLimits limits{};
  limits.index = device;
  check_cuda(cudaDeviceGetAttribute(&limits.num_multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "kd_loss device");
  check_cuda(cudaDeviceGetAttribute(&limits.major, cudaDevAttrComputeCapabilityMajor, device), "kd_loss device");
  check_cuda(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "kd_loss device");
  return limits;
}

// Fills gradient, kd and ce rows; a call of narrow rows may also write the totals, and returns whether it did.
bool launch_rows(const Job& job, bool count_rows, const Totals& totals, const Tensor& student_logits,
                 cudaStream_t stream) {
  const DeviceLimits limits = limits_of(student_logits.get_device_index());
  if (job.top_indices != nullptr) {
    launch_top(job, limits, stream);
  } else if (job.num_classes <= NARROW) {
    return launch_narrow(job, count_rows, totals, stream);
  } else if (launch_hopper(job, limits, stream)) {
    return false;
  } else if (split_takes(job)) {
    const std::vector<int64_t> size{static_cast<int64_t>(split_workspace_bytes(job))};
    // Freed on return: the allocator hands it out again in the order of the stream.
    Tensor workspace = torch::stable::new_empty(student_logits, size, ScalarType::Byte);
    launch_split(job, limits, workspace.mutable_data_ptr(), stream);
  } else {
    launch_wide(job, stream);
  }
  return false;
}

// What loss_and_gradient calls the place of its gradient.
enum class Output { NONE, NEW, IN_PLACE };

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_and_gradient(
    Tensor student_logits, std::optional<Tensor> teacher_logits, std::optional<Tensor> teacher_indices,
    std::optional<Tensor> labels, std::optional<Tensor> partner_labels, std::optional<Tensor> lam,
    std::optional<Tensor> row_weights, std::optional<Tensor> normalizer, int64_t divergence, double temperature,
    double beta, double alpha, double ab_alpha, double ab_beta, bool detach_mixture, double kd_weight, double ce_weight,
    bool tail_mass, int64_t ignore_index, int64_t reduction, Output output) {
  STD_TORCH_CHECK(student_logits.dim() == 2, "student_logits must be [rows, classes]");
  STD_TORCH_CHECK(divergence >= 0 && divergence < static_cast<int64_t>(Divergence::NONE), "divergence is ", divergence);
  const int64_t num_rows = student_logits.size(0);
  check_matrix("student_logits", student_logits, num_rows);
  // A row of a TopK is read again, class by class, after its gradient has been written.
  const bool in_place = output == Output::IN_PLACE, has_top = teacher_indices.has_value() && kd_weight != 0;
  STD_TORCH_CHECK(!in_place || student_logits.is_contiguous(), "student_logits must be contiguous to be overwritten");
  STD_TORCH_CHECK(!in_place || !has_top, "with teacher_indices student_logits cannot be overwritten");

  Job job{};
  job.student = student_logits.const_data_ptr();
  job.student_dtype = job.teacher_dtype = dtype_of("student_logits", student_logits);
  job.student_stride = student_logits.stride(0);
  job.num_rows = num_rows;
  job.num_classes = job.num_shared = checked_width("student_logits", student_logits);
  job.divergence = Divergence::NONE;
  if (teacher_logits.has_value() && kd_weight != 0) {
    check_matrix("teacher_logits", *teacher_logits, num_rows);
    check_device("teacher_logits", teacher_logits, student_logits);
    job.teacher = teacher_logits->const_data_ptr();
    job.teacher_dtype = dtype_of("teacher_logits", *teacher_logits);
    job.teacher_stride = teacher_logits->stride(0);
    job.options = {static_cast<float>(beta),
                   static_cast<float>(alpha),
                   static_cast<float>(ab_alpha),
                   static_cast<float>(ab_beta),
                   detach_mixture,
                   0.0f,
                   0.0f};
    job.divergence = effective_divergence(static_cast<Divergence>(divergence), job.options);
    const int teacher_width = checked_width("teacher_logits", *teacher_logits);
    if (teacher_indices.has_value()) {
      check_top_k(*teacher_indices, *teacher_logits, num_rows);
      check_device("teacher_indices", teacher_indices, student_logits);
      STD_TORCH_CHECK(job.divergence != Divergence::MSE, "mse compares logits; a top-k teacher has none");
      job.top_indices = pointer<int64_t>(teacher_indices);
      job.num_top = teacher_width;
    } else {
      job.num_shared = std::min(job.num_classes, teacher_width);
    }
  }
  check_rows("labels", labels, num_rows, ScalarType::Long);
  check_rows("partner_labels", partner_labels, num_rows, ScalarType::Long);
  check_rows("lam", lam, num_rows, ScalarType::Float);
  check_rows("row_weights", row_weights, num_rows, ScalarType::Float);
  check_device("labels", labels, student_logits);
  check_device("partner_labels", partner_labels, student_logits);
  check_device("lam", lam, student_logits);
  check_device("row_weights", row_weights, student_logits);
  STD_TORCH_CHECK(!partner_labels.has_value() || lam.has_value(), "partner_labels needs lam");
  job.labels = pointer<int64_t>(labels);
  job.partner_labels = pointer<int64_t>(partner_labels);
  job.lam = pointer<float>(lam);
  job.row_weights = pointer<float>(row_weights);
  job.ignore_index = ignore_index;
  job.temperature = static_cast<float>(temperature);
  // D carries temperature^2 and its derivative by a logit 1 / temperature; mse knows no temperature.
  const double power = job.divergence == Divergence::MSE ? 1.0 : temperature;
  job.kd_value_weight = static_cast<float>(power * power * kd_weight);
  job.kd_gradient_weight = static_cast<float>(power * kd_weight);
  job.ce_weight = job.labels == nullptr ? 0.0f : static_cast<float>(ce_weight);
  job.tail_mass = tail_mass;
  job.fixed_divisor = 1.0f;

  const int32_t device = student_logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  const bool by_row = reduction == 2;
  const auto new_floats = [&](const std::vector<int64_t>& size) {
    return torch::stable::new_empty(student_logits, size, ScalarType::Float);
  };
  const std::vector<int64_t> shape = by_row ? std::vector<int64_t>{num_rows} : std::vector<int64_t>{};
  Tensor loss = new_floats(shape), kd = new_floats(shape), ce = new_floats(shape);
  const bool need_grad = output != Output::NONE;
  Tensor gradient = student_logits;
  if (!in_place) {
    gradient = torch::stable::new_empty(
        student_logits, need_grad ? std::vector<int64_t>{num_rows, job.num_classes} : std::vector<int64_t>{0});
  }
  job.gradient = need_grad ? gradient.mutable_data_ptr() : nullptr;
  // Rows of kd and ce, and the divisor.
  Tensor workspace = new_floats({by_row ? 1 : 2 * num_rows + 1});
  float* rows = static_cast<float*>(workspace.mutable_data_ptr());
  const Totals totals{static_cast<float*>(loss.mutable_data_ptr()), static_cast<float*>(kd.mutable_data_ptr()),
                      static_cast<float*>(ce.mutable_data_ptr())};
  job.kd = by_row ? totals.kd : rows + 1;
  job.ce = by_row ? totals.ce : rows + 1 + num_rows;

  // One thread reads a row's logits at its labels while others may have begun to overwrite them: so they are read
  // first.
  const bool reads_labels = in_place && job.ce_weight != 0.0f && num_rows > 0;
  Tensor label_logits = new_floats({reads_labels ? 2 * num_rows : 1});
  if (reads_labels) {
    float* values = static_cast<float*>(label_logits.mutable_data_ptr());
    launch_label_logits(job, values, values + num_rows, stream);
    job.label_logits = values;
    job.partner_logits = values + num_rows;
  }

  bool count_rows = false;
  if (reduction == 0 && normalizer.has_value()) {
    check_device("normalizer", normalizer, student_logits);
    check_normalizer(normalizer, ScalarType::Float);
    job.divisor = pointer<float>(normalizer);
  } else if (reduction == 0 && job.labels == nullptr && job.partner_labels == nullptr && job.row_weights == nullptr) {
    job.fixed_divisor = static_cast<float>(num_rows);
  } else if (reduction == 0) {
    count_rows = job.top_indices == nullptr && narrow_counts_rows(job);
    if (!count_rows) {
      launch_divisor(job, rows, stream);
      job.divisor = rows;
    }
  }
  const Totals wanted = by_row ? Totals{} : totals;
  const bool has_totals = num_rows > 0 && launch_rows(job, count_rows, wanted, student_logits, stream);
  if (by_row) {
    launch_row_losses(job, totals.loss, stream);
  } else if (!has_totals) {
    launch_totals(job, totals, stream);
  }
  return {loss, kd, ce, gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kd_loss(Tensor student_logits, std::optional<Tensor> teacher_logits,
                                                   std::optional<Tensor> teacher_indices, std::optional<Tensor> labels,
                                                   std::optional<Tensor> partner_labels, std::optional<Tensor> lam,
                                                   std::optional<Tensor> row_weights, std::optional<Tensor> normalizer,
                                                   int64_t divergence, double temperature, double beta, double alpha,
                                                   double ab_alpha, double ab_beta, bool detach_mixture,
                                                   double kd_weight, double ce_weight, bool tail_mass,
                                                   int64_t ignore_index, int64_t reduction, bool need_grad,
                                                   bool /*raise_invalid: never waits for the device*/) {
  return loss_and_gradient(student_logits, teacher_logits, teacher_indices, labels, partner_labels, lam, row_weights,
                           normalizer, divergence, temperature, beta, alpha, ab_alpha, ab_beta, detach_mixture,
                           kd_weight, ce_weight, tail_mass, ignore_index, reduction,
                           need_grad ? Output::NEW : Output::NONE);
}

// The same, the gradient in the place of the logits.
std::tuple<Tensor, Tensor, Tensor> kd_loss_(Tensor student_logits, std::optional<Tensor> teacher_logits,
                                            std::optional<Tensor> teacher_indices, std::optional<Tensor> labels,
                                            std::optional<Tensor> partner_labels, std::optional<Tensor> lam,
                                            std::optional<Tensor> row_weights, std::optional<Tensor> normalizer,
                                            int64_t divergence, double temperature, double beta, double alpha,
                                            double ab_alpha, double ab_beta, bool detach_mixture, double kd_weight,
                                            double ce_weight, bool tail_mass, int64_t ignore_index, int64_t reduction,
                                            bool /*raise_invalid*/) {
  const auto [loss, kd, ce, gradient] =
      loss_and_gradient(student_logits, teacher_logits, teacher_indices, labels, partner_labels, lam, row_weights,
                        normalizer, divergence, temperature, beta, alpha, ab_alpha, ab_beta, detach_mixture, kd_weight,
                        ce_weight, tail_mass, ignore_index, reduction, Output::IN_PLACE);
  return {loss, kd, ce};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixkd_fast, CUDA, m) {
  m.impl("kd_loss", TORCH_BOX(&kd_loss));
  m.impl("kd_loss_", TORCH_BOX(&kd_loss_));
}

}  // namespace mixkd::cuda
