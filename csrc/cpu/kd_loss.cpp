// mixkd_fast::kd_loss on the CPU: arguments -> KdJob, threads over rows, the reduction, registration.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "instruction_set.h"
#include "kd_job.h"
#include "large_pages.h"

namespace mixkd {
namespace {

Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::F32;
    case ScalarType::BFloat16: return Dtype::BF16;
    case ScalarType::Half: return Dtype::F16;
    case ScalarType::Double: return Dtype::F64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

KdRows pick_row_loops() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::AVX512: return kd_rows_avx512;
    case InstructionSet::AVX2: return kd_rows_avx2;
    default: break;
  }
#endif
  return kd_rows_baseline;
}

double weight_of(const KdJob& job, bool compute_double, int64_t row) {
  if (job.row_weights == nullptr) return 1.0;
  return compute_double ? static_cast<const double*>(job.row_weights)[row]
                        : static_cast<const float*>(job.row_weights)[row];
}

// Refuses class numbers that are not there; NaN in a row's loss would hide which.
void check_classes(const KdJob& job, bool compute_double, int64_t num_rows) {
  for (int64_t r = 0; r < num_rows; ++r) {
    if (job.dropped(r, weight_of(job, compute_double, r)) || !job.invalid(r)) continue;
    const auto refuse = [&](const char* name, int64_t value, const char* also) {
      STD_TORCH_CHECK(job.in_range(value), name, " holds ", value, "; allowed: 0 to ", job.num_classes - 1, also);
    };
    const std::string or_ignored = ", or ignore_index " + std::to_string(job.ignore_index);
    if (job.labels != nullptr) refuse("labels", job.labels[r], or_ignored.c_str());
    if (job.partner_labels != nullptr) refuse("partner_labels", job.partner_labels[r], or_ignored.c_str());
    for (int64_t k = 0; job.top_indices != nullptr && k < job.num_top; ++k) {
      refuse("teacher_logits.indices", job.top_indices[r * job.num_top + k], "");
    }
  }
}

// 1 / what "mean" divides by: the normalizer, or the weight of the rows that are not dropped; 0 counts as 1.
double mean_scale(const KdJob& job, bool compute_double, int64_t num_rows, const std::optional<Tensor>& normalizer) {
  double divisor = 0;
  if (normalizer.has_value()) {
    const void* value = normalizer->const_data_ptr();
    divisor = compute_double ? *static_cast<const double*>(value) : *static_cast<const float*>(value);
  } else {
    for (int64_t r = 0; r < num_rows; ++r) {
      const double weight = weight_of(job, compute_double, r);
      if (!job.dropped(r, weight)) divisor += weight;
    }
  }
  return divisor == 0 ? 1.0 : 1.0 / divisor;
}

// [count], or [] for a scalar, of the compute type, from doubles. Past the dispatcher: three of these took a third of
// the time of a call of few rows.
Tensor stored(ScalarType compute, bool is_scalar, int64_t count, const double* values) {
  const int64_t stride = 1;
  const int32_t dtype = compute == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(is_scalar ? 0 : 1, &count, &stride, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  void* const out = tensor.mutable_data_ptr();
  if (compute == ScalarType::Double) {
    std::copy(values, values + count, static_cast<double*>(out));
  } else {
    std::transform(values, values + count, static_cast<float*>(out), [](double x) { return static_cast<float>(x); });
  }
  return tensor;
}

// What loss_and_gradient calls the place of its gradient.
enum class Output { NONE, NEW, IN_PLACE };

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_and_gradient(
    Tensor student_logits, std::optional<Tensor> teacher_logits, std::optional<Tensor> teacher_indices,
    std::optional<Tensor> labels, std::optional<Tensor> partner_labels, std::optional<Tensor> lam,
    std::optional<Tensor> row_weights, std::optional<Tensor> normalizer, int64_t divergence, double temperature,
    double beta, double alpha, double ab_alpha, double ab_beta, bool detach_mixture, double kd_weight, double ce_weight,
    bool tail_mass, int64_t ignore_index, int64_t reduction, Output output, bool raise_invalid) {
  STD_TORCH_CHECK(student_logits.dim() == 2, "student_logits must be [rows, classes]");
  STD_TORCH_CHECK(output != Output::IN_PLACE || student_logits.is_contiguous(),
                  "student_logits must be contiguous to be overwritten");
  const int64_t num_rows = student_logits.size(0), num_classes = student_logits.size(1);
  check_matrix("student_logits", student_logits, num_rows);
  STD_TORCH_CHECK(divergence >= 0 && divergence < static_cast<int64_t>(Divergence::NONE), "divergence is ", divergence);

  KdJob job{};
  job.student = student_logits.const_data_ptr();
  job.student_dtype = job.teacher_dtype = dtype_of("student_logits", student_logits);
  job.student_stride = student_logits.stride(0);
  job.num_classes = job.num_shared = num_classes;
  job.divergence = Divergence::NONE;
  bool compute_double = job.student_dtype == Dtype::F64;
  if (teacher_logits.has_value()) {
    // Also where kd_weight is 0: the dtype of a loss must not depend on a weight.
    compute_double = compute_double || teacher_logits->scalar_type() == ScalarType::Double;
  }
  if (teacher_logits.has_value() && kd_weight != 0) {
    check_matrix("teacher_logits", *teacher_logits, num_rows);
    job.teacher = teacher_logits->const_data_ptr();
    job.teacher_dtype = dtype_of("teacher_logits", *teacher_logits);
    job.teacher_stride = teacher_logits->stride(0);
    job.options = {beta, alpha, ab_alpha, ab_beta, detach_mixture, 0.0, 0.0};
    job.divergence = arranged(effective_divergence(static_cast<Divergence>(divergence), job.options), job.options);
    if (teacher_indices.has_value()) {
      check_top_k(*teacher_indices, *teacher_logits, num_rows);
      STD_TORCH_CHECK(job.divergence != Divergence::MSE, "mse compares logits; a top-k teacher has none");
      job.top_indices = static_cast<const int64_t*>(teacher_indices->const_data_ptr());
      job.num_top = teacher_indices->size(1);
    } else {
      job.num_shared = std::min(num_classes, teacher_logits->size(1));
    }
  }
  const ScalarType compute = compute_double ? ScalarType::Double : ScalarType::Float;
  check_rows("labels", labels, num_rows, ScalarType::Long);
  check_rows("partner_labels", partner_labels, num_rows, ScalarType::Long);
  check_rows("lam", lam, num_rows, compute);
  check_rows("row_weights", row_weights, num_rows, compute);
  check_normalizer(normalizer, compute);
  STD_TORCH_CHECK(!partner_labels.has_value() || lam.has_value(), "partner_labels needs lam");
  job.labels = static_cast<const int64_t*>(data_or_null(labels));
  job.partner_labels = static_cast<const int64_t*>(data_or_null(partner_labels));
  job.lam = data_or_null(lam);
  job.row_weights = data_or_null(row_weights);
  job.ignore_index = ignore_index;
  job.temperature = temperature;
  job.kd_weight = kd_weight;
  job.ce_weight = job.labels == nullptr ? 0.0 : ce_weight;
  job.tail_mass = tail_mass;
  if (raise_invalid) check_classes(job, compute_double, num_rows);
  job.scale = reduction == 0 ? mean_scale(job, compute_double, num_rows, normalizer) : 1.0;

  const bool need_grad = output != Output::NONE;
  job.in_place = output == Output::IN_PLACE;
  Tensor gradient = student_logits;
  if (!job.in_place) {
    gradient = on_large_pages(torch::stable::new_empty(
        student_logits, need_grad ? std::vector<int64_t>{num_rows, num_classes} : std::vector<int64_t>{0}));
  }
  job.gradient = need_grad ? gradient.mutable_data_ptr() : nullptr;
  std::vector<double> row_values(2 * num_rows);
  job.kd = row_values.data();
  job.ce = job.kd + num_rows;

  static const KdRows row_loops = pick_row_loops();
  // A thread is worth its start from some thousand classes on; narrow rows want whole groups of 16.
  const int64_t grain = std::max<int64_t>(1, (int64_t(8192) / num_classes + 15) / 16 * 16);
  const int64_t rows_at_once = num_classes >= 8192 ? 1 : grain;
  torch::stable::parallel_for(0, num_rows, rows_at_once,
                              [&](int64_t begin, int64_t end) { row_loops(job, compute_double, begin, end); });

  std::vector<double> losses(num_rows);
  double sums[3] = {0, 0, 0};  // loss, kd, ce
  for (int64_t r = 0; r < num_rows; ++r) {
    losses[r] = job.kd[r] + job.ce[r];
    sums[1] += job.kd[r];
    sums[2] += job.ce[r];
  }
  sums[0] = sums[1] + sums[2];
  const bool by_row = reduction == 2;
  const auto result = [&](const double* rows, const double* sum) {
    return stored(compute, !by_row, by_row ? num_rows : 1, by_row ? rows : sum);
  };
  return {result(losses.data(), sums), result(job.kd, sums + 1), result(job.ce, sums + 2), gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kd_loss(
    Tensor student_logits, std::optional<Tensor> teacher_logits, std::optional<Tensor> teacher_indices,
    std::optional<Tensor> labels, std::optional<Tensor> partner_labels, std::optional<Tensor> lam,
    std::optional<Tensor> row_weights, std::optional<Tensor> normalizer, int64_t divergence, double temperature,
    double beta, double alpha, double ab_alpha, double ab_beta, bool detach_mixture, double kd_weight, double ce_weight,
    bool tail_mass, int64_t ignore_index, int64_t reduction, bool need_grad, bool raise_invalid) {
  return loss_and_gradient(student_logits, teacher_logits, teacher_indices, labels, partner_labels, lam, row_weights,
                           normalizer, divergence, temperature, beta, alpha, ab_alpha, ab_beta, detach_mixture,
                           kd_weight, ce_weight, tail_mass, ignore_index, reduction,
                           need_grad ? Output::NEW : Output::NONE, raise_invalid);
}

// The same, the gradient in the place of the logits.
std::tuple<Tensor, Tensor, Tensor> kd_loss_(Tensor student_logits, std::optional<Tensor> teacher_logits,
                                            std::optional<Tensor> teacher_indices, std::optional<Tensor> labels,
                                            std::optional<Tensor> partner_labels, std::optional<Tensor> lam,
                                            std::optional<Tensor> row_weights, std::optional<Tensor> normalizer,
                                            int64_t divergence, double temperature, double beta, double alpha,
                                            double ab_alpha, double ab_beta, bool detach_mixture, double kd_weight,
                                            double ce_weight, bool tail_mass, int64_t ignore_index, int64_t reduction,
                                            bool raise_invalid) {
  const auto [loss, kd, ce, gradient] =
      loss_and_gradient(student_logits, teacher_logits, teacher_indices, labels, partner_labels, lam, row_weights,
                        normalizer, divergence, temperature, beta, alpha, ab_alpha, ab_beta, detach_mixture, kd_weight,
                        ce_weight, tail_mass, ignore_index, reduction, Output::IN_PLACE, raise_invalid);
  return {loss, kd, ce};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixkd_fast, CPU, m) {
  m.impl("kd_loss", TORCH_BOX(&kd_loss));
  m.impl("kd_loss_", TORCH_BOX(&kd_loss_));
}

}  // namespace mixkd
