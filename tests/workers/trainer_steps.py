"""One step of several trainers in two processes (torchrun); process 0 saves the weights that each ends with.

Arguments: folder for the results, "transformers" or "trl" or "zero3".
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import trainer_cases as cases


def transformers_trainers(folder: Path) -> dict[str, Any]:
    return {
        **{
            f"lm-{name}": lambda loss=loss: cases.lm_trainer(folder, 2, 2, loss)
            for name, loss in cases.LM_LOSSES.items()
        },
        "mixkd": lambda: cases.mixkd_trainer(folder, 2, 2),
        "mixkd-zero": lambda: cases.mixkd_trainer(folder, 2, 2, padding="zero", lam_per="batch", mixed_rows=1),
    }


def trl_trainers(folder: Path) -> dict[str, Any]:
    import trl_cases

    return {name: lambda loss=loss: trl_cases.trainer(folder, 2, 2, loss) for name, loss in trl_cases.LOSSES.items()}


def zero3_trainers(folder: Path) -> dict[str, Any]:
    config = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    return {
        "lm-kl": lambda: cases.lm_trainer(folder, 2, 2, cases.LM_LOSSES["kl"], deepspeed=config),
        "mixkd": lambda: cases.mixkd_trainer(folder, 2, 2, training={"deepspeed": config}),
    }


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    if not trainer.is_deepspeed_enabled:
        return cases.weights(trainer.model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
        return cases.weights(trainer.model)


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    made = {"transformers": transformers_trainers, "trl": trl_trainers, "zero3": zero3_trainers}[kind](folder / "runs")
    for name, make in made.items():
        trainer = make()
        trainer.train()
        result: dict[str, Any] = {"weights": whole_weights(trainer), "loss": trainer.state.log_history[0]["loss"]}
        if kind == "zero3":
            result["held"] = sum(parameter.numel() for parameter in trainer.teacher.model.parameters())
        if trainer.eval_dataset is not None:
            result["metrics"] = trainer.evaluate()
        if trainer.accelerator.is_main_process:
            torch.save(result, folder / f"{name}.pt")
        trainer.accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
