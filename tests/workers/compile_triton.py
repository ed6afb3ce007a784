"""Compiles every Triton kernel to machine code for sm_80 and sm_90, for which no GPU is needed. Prints their number.

Run as a program of its own: in the tests' process Triton's functions are interpreted.
"""

import itertools
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mixkd_fast.ops import triton_kd_narrow as narrow
from mixkd_fast.ops import triton_kd_top_k as top_k
from mixkd_fast.ops import triton_kd_wide as wide
from mixkd_fast.ops import triton_mix_kernels as mix
from mixkd_fast.ops import triton_relation_kernels as relation

TYPES = {
    "labels": "*i64",
    "partner_labels": "*i64",
    "indices": "*i64",
    "progress": "*i32",
    "input_ids": "*i64",
    "partner": "*i64",
    "padding_mask": "*i1",
    "token_type_ids": "*i64",
    "position_ids": "*i64",
    "rows": "*i64",
    "tokens": "*i64",
    "weight": "*bf16",
    "output": "*bf16",
    "grad_output": "*bf16",
    "table": "*bf16",
    "student_logits": "*bf16",
    "teacher_logits": "*bf16",
    "grad_logits": "*bf16",
    "num_rows": "i32",
    "num_splits": "i32",
    "num_classes": "i32",
    "num_shared": "i32",
    "num_top": "i32",
    "lag": "i32",
    "length": "i32",
    "width": "i32",
    "num_words": "i32",
    "num_positions": "i32",
    "num_types": "i32",
    "num_clean": "i32",
    "num_leading": "i32",
    "num_tokens": "i32",
    "num_entries": "i32",
    "tokens_each": "i32",
    "norm_eps": "fp32",
    "student_stride": "i64",
    "teacher_stride": "i64",
    "ignore_index": "i64",
    "inverse_temperature": "fp32",
    "kd_factor": "fp32",
    "kd_grad_factor": "fp32",
    "ce_weight": "fp32",
    "beta": "fp32",
    "log_weight_p": "fp32",
    "log_weight_q": "fp32",
    "ab_alpha": "fp32",
    "ab_beta": "fp32",
    "keep": "*i1",
    "num_queries": "i32",
    "num_heads": "i32",
    "num_blocks": "i32",
    "student_width": "i32",
    "teacher_width": "i32",
    "student_scale": "fp32",
    "teacher_scale": "fp32",
    "factor": "fp32",
    **{f"{side}_{axis}": "i64" for side in ("sf", "ss", "tf", "ts") for axis in "ohld"},
}
"""Of the kernels' arguments; pointers to fp32 else."""
NARROW = {"OUTPUT": 0, "DIVISOR": 1, "ROWS": 128, "CLASSES": 4}
MIX_EXTRAS = ("padding_mask", "position_weight", "token_type_ids", "token_type_weight", "position_ids", "norm_bias")


def compile_kernel(
    kernel: Any, warps: int, capability: int, types: dict[str, str] | None = None, **constants: Any
) -> str:
    """The PTX of a kernel; raises what Triton raises. `types` go before TYPES."""
    names = kernel.arg_names
    known = TYPES | (types or {})
    signature = {name: "constexpr" if name in constants else known.get(name, "*fp32") for name in names}
    # As at a launch: pointers come 16-byte aligned.
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    text: str = compiled.asm["ptx"]
    return text


def main() -> None:
    """Every divergence, with and without what may be missing."""
    done = 0
    for capability in (80, 90):
        # Cross entropy: none, with the divergence's softmax, with its own.
        for divergence, cross_entropy in itertools.product(range(10), (0, 1, 2)):
            if (cross_entropy == 1 and divergence >= 8) or (capability == 80 and cross_entropy != 2):
                continue
            common: dict[str, Any] = {
                "DIVERGENCE": divergence,
                "DETACH_MIXTURE": False,
                "AB_LIMITS": 8,
                "CROSS_ENTROPY": cross_entropy,
                "NEED_GRAD": True,
                "row_weights": None,
            }
            if cross_entropy == 0:
                common |= {"lam": None, "partner_labels": None}
            shares = {} if divergence == 6 else {"adaptive_shares": None}
            compile_kernel(narrow.kd_loss_narrow_kernel, 4, capability, **common, **NARROW)
            compile_kernel(wide.kd_loss_wide_kernel, 8, capability, **common, **shares, TILE=4096, SPLITS=32)
            done += 2
            if divergence < 8:
                tail = {"HAS_TAIL": cross_entropy == 2, "TILE": 128, "LANES": 64}
                compile_kernel(top_k.kd_loss_top_k_kernel, 4, capability, **common, **tail)
                done += 1
        compile_kernel(wide.adaptive_shares_kernel, 8, capability, row_weights=None, partner_labels=None, TILE=4096)
        for extras in ({}, dict.fromkeys(MIX_EXTRAS)):
            compile_kernel(mix.forward_kernel, 4, capability, **extras, USE_NORM=not extras, BLOCK=1024)
            without = {name: None for name in extras if name in mix.norm_backward_kernel.arg_names}
            compile_kernel(mix.norm_backward_kernel, 4, capability, **without, BLOCK=1024)
        compile_kernel(mix.sum_runs_kernel, 4, capability, ENTRIES=64, BLOCK=1024)
        compile_kernel(mix.join_runs_kernel, 4, capability, ENTRIES=64, BLOCK=1024)
        done += 7
    print(f"compiled {done + compile_variants() + compile_relations()} kernels")


def compile_relations() -> int:
    """relation_kl in half precision and in fp32, its smallest and largest blocks. Returns their number."""
    done = 0
    precisions = ("STUDENT_PRECISION", "TEACHER_PRECISION")
    for capability, (half, size) in itertools.product((80, 90), itertools.product((True, False), (16, 64))):
        of_half = {f"{model}_{side}": "*bf16" for model in ("student", "teacher") for side in ("first", "second")}
        types = {**of_half, "gradient": "*bf16"} if half else {}
        common: dict[str, Any] = {name: "tf32" if half else "ieee" for name in precisions}
        # The numbers of a head lie next to each other: a stride of 1 is a constant at a launch.
        common |= {"BLOCK": size, "CHUNK": size, "types": types}
        common |= dict.fromkeys(("sf_d", "ss_d", "tf_d", "ts_d"), 1)
        compile_kernel(relation.statistics_kernel, 4, capability, **common)
        for of_first in (True, False):
            last = {"OF_FIRST": of_first, "PRECISION": "tf32x3" if half else "ieee"}
            compile_kernel(relation.gradient_kernel, 4, capability, **common, **last)
        done += 3
    return done


def compile_variants() -> int:
    """What a launch may leave out, and arguments of 1, which a launch turns into constants. Returns their number."""
    options = {"DETACH_MIXTURE": True, "AB_LIMITS": 0, "row_weights": None, "partner_labels": None, "lam": None}
    wide_sizes = {"TILE": 4096, "SPLITS": 1, "adaptive_shares": None}
    top_sizes = {"HAS_TAIL": True, "TILE": 32, "LANES": 2048}
    variants: list[tuple[Any, int, dict[str, Any]]] = [
        (mix.sum_runs_kernel, 4, {"ENTRIES": 64, "BLOCK": 16}),
        (mix.join_runs_kernel, 4, {"ENTRIES": 64, "BLOCK": 16}),
        (mix.norm_backward_kernel, 16, {"norm_weight": None, "position_weight": None, "BLOCK": 16384}),
        (mix.forward_kernel, 1, {"USE_NORM": True, "norm_weight": None, "norm_bias": None, "BLOCK": 16}),
        (mix.forward_kernel, 4, {"USE_NORM": True, "position_ids": None, "BLOCK": 1024}),
        (mix.forward_kernel, 1, {"USE_NORM": False, "position_weight": None, "position_ids": None, "BLOCK": 16}),
        (wide.adaptive_shares_kernel, 8, {"labels": None, "partner_labels": None, "TILE": 4096}),
        (
            top_k.kd_loss_top_k_kernel,
            4,
            {**options, **top_sizes, "DIVERGENCE": 6, "CROSS_ENTROPY": 2, "NEED_GRAD": True},
        ),
    ]
    for need_grad, divergence in ((True, 4), (True, 9), (False, 0)):
        more = {**options, "DIVERGENCE": divergence, "NEED_GRAD": need_grad, "divisor": None}
        narrow_sizes = {"OUTPUT": 1, "DIVISOR": 0, "ROWS": 1, "CLASSES": 512}
        for labels in ({"CROSS_ENTROPY": 2}, {"CROSS_ENTROPY": 0, "labels": None}):
            variants.append((narrow.kd_loss_narrow_kernel, 4, {**more, **labels, **narrow_sizes}))
            variants.append((wide.kd_loss_wide_kernel, 8, {**more, **labels, **wide_sizes}))
            if divergence < 8:
                variants.append((top_k.kd_loss_top_k_kernel, 4, {**more, **labels, **top_sizes, "LANES": 2}))
    for kernel, warps, constants in variants:
        whole = [name for name in kernel.arg_names if TYPES.get(name) in ("i32", "i64") and name not in constants]
        compile_kernel(kernel, warps, 90, **constants)
        compile_kernel(kernel, warps, 90, **constants, **dict.fromkeys(whole, 1))
    return 2 * len(variants)
    return len(variants)


if __name__ == "__main__":
    main()
