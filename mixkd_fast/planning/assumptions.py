"""What a plan takes for granted, in sentences."""

from mixkd_fast.configuration import Config
from mixkd_fast.planning import hardware
from mixkd_fast.planning.plan import Plan

_GIB = 2**30


def assumptions(plan: Plan, config: Config) -> list[str]:
    """Everything that is assumed and not computed, as sentences."""
    any_work = next(count.work for device in plan.devices for count in device.counts if count.work is not None)
    planned = config.training.batching == "length"
    texts = [
        f"Padding: micro-batches of {any_work.micro_batch_size} {'rows of like length' if planned else 'random rows'} "
        f"have {any_work.lengths.padding_overhead:.0%} more positions than tokens (sampled); memory is that of the "
        f"widest, {any_work.widest} positions.",
        "Memory is the larger of two moments, the backward and the update; DeepSpeed's bucket of reduce_bucket_size "
        "elements is allocated whole on a GPU and only as far as it is written on the CPU.",
    ]
    if config.task.kind == "causal_lm":
        texts.append(
            f"The output layers see {any_work.target_share:.0%} of the clean tokens, a chunk at a time; attention is "
            "causal. Every rank reads the whole student into its memory before DeepSpeed shares it; generated text "
            "is not counted."
        )
    if config.teacher is not None and config.teacher.offline is not None:
        reads = "The teacher does not run on the clean rows: its answers come from teacher.offline"
        unread = f", {config.teacher.offline!r}, which is not here: they, and a kept output layer, are not counted"
        texts.append(f"{reads}{'' if any_work.stored is not None else unread}.")
    if plan.placement.teacher_offload != "none":
        texts.append(
            f"The teacher is fetched once per micro-batch: {hardware.HOST_LINK_BYTES_PER_S / 1e9:.0f} GB/s from the "
            f"node's memory to each GPU, {hardware.NVME_BYTES_PER_S / 1e9:.0f} GB/s from its NVMe to all; assumed."
        )
    if plan.teacher is not None and any_work.teacher_clean_share not in (0.0, 1.0):
        texts.append(
            "The teacher's answers on clean rows are computed in the first epoch and then read: "
            f"{any_work.teacher_clean_share:.2f} of its forwards on average."
        )
    texts += [f"Not counted of method {config.method.name}: {text}." for text in config.method.not_planned]
    if any(device.is_gpu for device in plan.devices):
        texts += [
            f"GPUs: data-sheet peaks (fp32 without TF32), {hardware.MATMUL_EFFICIENCY:.0%} of them in matrix products, "
            f"{hardware.ATTENTION_EFFICIENCY:.0%} in attention, {hardware.BANDWIDTH_EFFICIENCY:.0%} of the bandwidth "
            f"elsewhere, at least {hardware.LAUNCH_S * 1e6:.0f} us a kernel. These shares have not been measured.",
            f"Exchange: rings, {hardware.DEVICES_PER_NODE} GPUs a node over NVLink in one direction, "
            f"{hardware.NETWORK_BYTES_PER_S / 1e9:.0f} GB/s per GPU between nodes, "
            f"{hardware.COLLECTIVE_S * 1e6:.0f} us times log2(ranks) a call; nothing overlaps with computing. "
            "The transfers of an offloaded student are not counted.",
            f"A GPU can use {hardware.USABLE_SHARE:.0%} of what {hardware.RESERVED_BYTES / _GIB:.1f} GiB of CUDA and "
            "NCCL leave.",
        ]
    if any(not device.is_gpu for device in plan.devices):
        texts.append("CPU: one rank with this process's threads; rates measured just now on the models' own shapes.")
    texts.append("Hours are those of the training steps, without evaluation, checkpoints and loading.")
    return texts
