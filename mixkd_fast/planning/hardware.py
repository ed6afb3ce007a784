"""Devices a plan is made for: tabulated GPUs, and the CPU at hand, whose speed is measured in about a second."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from mixkd_fast.configuration import Precision
from mixkd_fast.ops.dropout import dropout as fast_dropout
from mixkd_fast.planning.decoders import DecoderShape
from mixkd_fast.planning.models import PlannedModel

MATMUL_EFFICIENCY = 0.5
"""Share of a GPU's dense peak that products of an encoder's shapes reach (assumed, not measured)."""
ATTENTION_EFFICIENCY = 0.25
"""The same for the small products of attention."""
BANDWIDTH_EFFICIENCY = 0.8
"""Share of a GPU's memory bandwidth that normalisation, activation, dropout and the optimizer reach."""
LAUNCH_S = 5e-6
"""Seconds that the host needs to start one GPU kernel; a part takes at least its number of kernels times this."""
COLLECTIVE_S = 30e-6
"""Seconds that any exchange between ranks takes, however small."""
RESERVED_BYTES = int(1.5 * 2**30)
"""Taken on a GPU by CUDA, NCCL and the libraries."""
USABLE_SHARE = 0.95
"""Share of the rest that an allocator can use before fragments stop it."""
NETWORK_BYTES_PER_S = 50e9
"""Between nodes, per GPU and direction (400 Gbit/s)."""
DEVICES_PER_NODE = 8
HOST_LINK_BYTES_PER_S = 25e9
"""From a node's memory to one GPU (PCIe 4 x16, or half of PCIe 5)."""
NVME_BYTES_PER_S = 6e9
"""Read from the NVMe disk of a node, by all its ranks together."""
ADAM_BYTES = 28
"""Of AdamW's update per fp32 parameter: weight, gradient and two states read, three of them written."""
_LONG_ELEMENTS, _CHUNKS = 12 * 2**20, 16
_COLD_ELEMENTS = 12 * 2**20
_PROBE_S = 0.08
_PROBE_POSITIONS = 4096


@dataclass(frozen=True)
class Device:
    """What a data sheet says. Bandwidths are bytes per second; link and network per device and direction."""

    name: str
    flops_per_s: dict[Precision, float]
    """Dense peak of matrix products."""
    bandwidth_bytes_per_s: float
    memory_bytes: int
    link_bytes_per_s: float

    @property
    def usable_bytes(self) -> int:
        """Memory that models and activations may take."""
        return int((self.memory_bytes - RESERVED_BYTES) * USABLE_SHARE)


def _gpu(name: str, half: float, single: float, bandwidth: float, memory_gb: int, nvlink_total: float) -> Device:
    peaks: dict[Precision, float] = {"fp32": single * 1e12, "bf16": half * 1e12, "fp16": half * 1e12}
    # A data sheet's NVLink figure adds up both directions.
    return Device(name, peaks, bandwidth * 1e9, memory_gb * 10**9, nvlink_total / 2 * 1e9)


GPUS = {
    "A100": _gpu("A100", 312, 19.5, 2039, 80, 600),
    "H100": _gpu("H100", 989, 67, 3350, 80, 900),
    "H200": _gpu("H200", 989, 67, 4800, 141, 900),
}


@dataclass(frozen=True)
class Rates:
    """What a model's parts really reach, per second."""

    linear_forward: float
    """FLOPs of the layers' matrix products."""
    linear_training: float
    """The same over forward and backward."""
    attention_forward: float
    attention_training: float
    elementwise_forward: float
    """Bytes, read and written, of everything that is no matrix product."""
    elementwise_training: float
    copy: float
    """Bytes, read and written, of long copies."""
    fresh: float
    """The same into new memory, which a CPU's system hands out page by page."""
    update: float
    """Bytes that AdamW reads and writes."""
    launch_s: float
    """Least seconds of one kernel."""


def gpu_rates(device: Device, precision: Precision) -> Rates:
    """A GPU's rates under the stated efficiencies."""
    peak, bandwidth = device.flops_per_s[precision], BANDWIDTH_EFFICIENCY * device.bandwidth_bytes_per_s
    linear, attention = MATMUL_EFFICIENCY * peak, ATTENTION_EFFICIENCY * peak
    return Rates(linear, linear, attention, attention, *(bandwidth,) * 5, LAUNCH_S)


def cpu_device() -> Device:
    """This machine; its speed is in `measured_rates`. One rank uses all of it."""
    return Device("cpu", {}, 0.0, int(psutil.virtual_memory().available), 0.0)


def measured_rates(
    model: PlannedModel, rows: int, width: int, precision: Precision, fused: bool, threads: int | None = None
) -> Rates:
    """This CPU's rates, measured now on a model's own shapes.

    Args: rows, width = of one forward, long ones are shortened; threads = training.threads, None leaves them as set.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _measured_rates(model, rows, width, precision, fused)
    finally:
        torch.set_num_threads(before)


def _measured_rates(model: PlannedModel, rows: int, width: int, precision: Precision, fused: bool) -> Rates:
    rows = max(1, min(rows, _PROBE_POSITIONS // width))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = _linear_probe(model, rows * width, dtype)
        attention = _attention_probe(model, rows, width, dtype, fused)
        elementwise = _elementwise_probe(model, rows * width, dtype, fused)
    return Rates(*linear, *attention, *elementwise, *_long_probe(), launch_s=2e-6)


def elementwise_widths(model: PlannedModel) -> tuple[int, int]:
    """Elements that one layer reads and writes per position outside matrix products: forward, and with backward.

    Two residual sums (3), two normalisations (2 forward, 3 backward), the activation, sums of gradients (3) and of
    biases; each dropout passes over its values and its mask.
    """
    if isinstance(model.shape, DecoderShape):
        return decoder_elementwise_widths(model.shape)
    hidden, inner = model.shape.hidden_size, model.shape.intermediate_size
    dropout = 6 * hidden if model.has_dropout else 0
    forward = 10 * hidden + 2 * inner
    backward = 21 * hidden + 4 * inner
    return forward, forward + backward + 2 * dropout


def decoder_elementwise_widths(shape: DecoderShape) -> tuple[int, int]:
    """The same of a decoder in transformers' own operations, each of which reads its inputs and writes its result.

    Two residual sums (6 h), a normalisation (10 h by root mean square, 2 h by one kernel), turning queries and keys
    (10 each), activation and product (5 i, or 2 i without a gate); the backward twice that.
    """
    turned = shape.attention_size + shape.key_value_size
    norm = 10 if shape.is_rms else 2
    inner = (5 if shape.is_gated else 2) * shape.intermediate_size
    forward = (6 + norm * shape.hidden_norms) * shape.hidden_size + 10 * turned + inner
    return forward, 3 * forward


def _linear_probe(model: PlannedModel, positions: int, dtype: torch.dtype) -> tuple[float, float]:
    hidden, inner = model.shape.hidden_size, model.shape.intermediate_size
    sizes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)]
    layers = [
        (
            torch.randn(positions, columns, dtype=dtype),
            torch.randn(rows, columns, dtype=dtype),
            torch.zeros(rows).to(dtype),
        )
        for columns, rows in sizes
    ]

    def forward() -> list[Tensor]:
        return [F.linear(*layer) for layer in layers]

    flops = 2.0 * positions * sum(columns * rows for columns, rows in sizes)
    forward_s = _seconds(forward)
    for layer in layers:
        for tensor in layer:
            tensor.requires_grad_()
    gradients = [torch.randn(positions, rows, dtype=dtype) for _, rows in sizes]
    tensors = [tensor for layer in layers for tensor in layer]
    training_s = _seconds(lambda: torch.autograd.grad(forward(), tensors, gradients))
    return flops / forward_s, 3 * flops / training_s


def _attention_probe(
    model: PlannedModel, rows: int, width: int, dtype: torch.dtype, fused: bool
) -> tuple[float, float]:
    """From stacked queries, keys and values to attended values, with the copies that small products need."""
    heads, hidden = model.shape.num_heads, model.shape.hidden_size
    joint = torch.randn(rows, width, 3 * hidden, dtype=dtype)
    bias = torch.zeros(rows, 1, 1, width, dtype=dtype)
    probability = 0.1 if model.has_attention_dropout else 0.0
    shape = (rows * heads, width, hidden // heads)

    def forward(p: float) -> Tensor:
        query, key, value = joint.view(rows, width, 3, heads, -1).permute(2, 0, 3, 1, 4)
        if fused:
            scores = torch.bmm(query.reshape(shape) * shape[2] ** -0.5, key.reshape(shape).transpose(1, 2))
            shares = fast_dropout(F.softmax(scores.view(rows, heads, width, width) + bias, -1), p)
            attended = torch.bmm(shares.view(-1, width, width), value.reshape(shape)).view(rows, heads, width, -1)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, bias.expand(-1, -1, width, -1), p)
        return attended.transpose(1, 2).reshape(rows, width, hidden)

    flops = 4.0 * rows * width * width * hidden
    forward_s = _seconds(lambda: forward(0.0))
    joint.requires_grad_()
    gradient = torch.randn(rows, width, hidden, dtype=dtype)
    training_s = _seconds(lambda: torch.autograd.grad(forward(probability), joint, gradient))
    return flops / forward_s, 3 * flops / training_s


def _elementwise_probe(model: PlannedModel, positions: int, dtype: torch.dtype, fused: bool) -> tuple[float, float]:
    hidden, inner = model.shape.hidden_size, model.shape.intermediate_size
    first, second = (torch.randn(positions, hidden, dtype=dtype) for _ in range(2))
    wide = torch.randn(positions, inner, dtype=dtype)
    weight, bias = torch.ones(hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    probability = 0.1 if model.has_dropout else 0.0
    dropout = fast_dropout if fused else F.dropout

    def forward(p: float) -> list[Tensor]:
        once = F.layer_norm(first + dropout(second, p), (hidden,), weight, bias)
        twice = F.layer_norm(second + dropout(first, p), (hidden,), weight, bias)
        return [once, twice, F.gelu(wide)]

    forward_width = 10 * hidden + 2 * inner
    # Of the backward's passes the sums of biases' gradients belong to the matrix products' probe.
    training_width = forward_width + 16 * hidden + 3 * inner + (12 * hidden if probability else 0)
    forward_s = _seconds(lambda: forward(0.0))
    tensors = [tensor.requires_grad_() for tensor in (first, second, wide, weight, bias)]
    gradients = [torch.randn_like(first), torch.randn_like(first), torch.randn_like(wide)]
    training_s = _seconds(lambda: torch.autograd.grad(forward(probability), tensors, gradients))
    bytes_per_width = positions * first.element_size()
    return forward_width * bytes_per_width / forward_s, training_width * bytes_per_width / training_s


def _long_probe() -> tuple[float, float, float]:
    """Bytes per second of copies, copies into new memory, and AdamW's update, on tensors beyond any cache."""
    source = torch.ones(_LONG_ELEMENTS)
    target = torch.empty_like(source)
    copy_s = _seconds(lambda: target.copy_(source))
    # DeepSpeed's buffers are made so.
    fresh_s = _seconds(lambda: torch.cat(source.chunk(_CHUNKS)))
    weight = torch.nn.Parameter(target)
    weight.grad = source
    update_s = _seconds(torch.optim.AdamW([weight], fused=True).step)
    return 2 * source.nbytes / copy_s, 2 * source.nbytes / fresh_s, ADAM_BYTES * _LONG_ELEMENTS / update_s


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of one call: the median over calls that fill a short while, after one that warms up.

    Between calls the caches are emptied: in a model a layer comes back after all others have run.
    """
    cold = torch.zeros(_COLD_ELEMENTS)
    work()
    taken: list[float] = []
    end = time.perf_counter() + _PROBE_S
    while not taken or time.perf_counter() < end:
        cold.add_(1.0)
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]
