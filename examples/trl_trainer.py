"""Distillation of a language model in TRL: its GKDTrainer with this project's losses.

TRL brings the teacher, the chat collator and on-policy generation; the loss is this project's, with its divergences,
its temperature and its hard-label term. Tiny random models and data, nothing is downloaded.
Run: python examples/trl_trainer.py
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig

from mixkd_fast.integrations import GKDTrainer
from mixkd_fast.losses import LinearKDLoss

WORDS = [f"w{number}" for number in range(24)]


def tiny_llama(layers: int, hidden_size: int, vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, with a chat template."""
    vocabulary = {
        word: number for number, word in enumerate(["[PAD]", "[END]", "[UNK]", "user:", "assistant:", *WORDS])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]", model_max_length=64
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }} [END] {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def random_chats(count: int) -> Dataset:
    """Questions and answers of 3 to 8 random words."""

    def words() -> str:
        length = int(torch.randint(3, 9, ()))
        return " ".join(WORDS[number] for number in torch.randint(len(WORDS), (length,)).tolist())

    chats = [[{"role": "user", "content": words()}, {"role": "assistant", "content": words()}] for _ in range(count)]
    return Dataset.from_dict({"messages": chats})


def main(
    steps: int = 60,
    micro_batch_size: int = 8,
    accumulation_steps: int = 2,
    seed: int = 0,
    trainer_class: Any = GKDTrainer,
    **own: Any,
) -> list[float]:
    """Train for `steps` optimizer steps and return the loss of each. `own`: arguments of the trainer's class alone."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    teacher, student = tiny_llama(2, 32, len(tokenizer)), tiny_llama(1, 16, len(tokenizer))
    with torch.no_grad():
        teacher.lm_head.weight *= 20
    with tempfile.TemporaryDirectory() as folder:
        arguments = GKDConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation_steps,
            gradient_checkpointing=False,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            bf16=False,
            lmbda=0.0,  # only the data's answers; above 0 the student also learns on its own
            max_length=64,
            seed=seed,
        )
        trainer = trainer_class(
            model=student,
            teacher_model=teacher,
            args=arguments,
            train_dataset=random_chats(128),
            processing_class=tokenizer,
            **own,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    # From hidden states and heads: whole logits never exist. A KDLoss takes the same options and works on logits.
    losses = main(loss=LinearKDLoss(divergence="jsd", beta=0.5, temperature=2.0))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
