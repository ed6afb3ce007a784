"""The face of causal language models: heads, hidden states, tied embeddings, layers, tokenizers, generation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_lm import FAMILIES, batch_of, byte_tokenizer, random_rows, save_lm, tiny_lm

from mixkd_fast.causal_lm import CausalLM, check_head
from mixkd_fast.configuration import Student, Teacher
from mixkd_fast.data.batching import Batch
from mixkd_fast.data.next_tokens import IGNORED, left_padded_prompts
from mixkd_fast.errors import ModelError
from mixkd_fast.language_models import load_student_lm, load_teacher_lm
from mixkd_fast.language_task import Sampling
from mixkd_fast.mixing import Mixing
from mixkd_fast.pretrained import load_tokenizer


def training_batch(**draw: Any) -> Batch:
    return batch_of(random_rows(), **draw)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_times_hidden_is_what_the_model_says(family: str) -> None:
    lm, batch = CausalLM(tiny_lm(family)), training_batch()
    check_head(lm)
    with torch.no_grad():
        own = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        ours = lm.logits(batch)
        answers = lm.answers(batch)
    learnt = batch.labels != IGNORED
    torch.testing.assert_close(ours[learnt], own[learnt], rtol=1e-4, atol=1e-4)
    nll = -own.log_softmax(-1).gather(2, batch.labels.clamp(min=0)[..., None])[..., 0]
    expected = torch.stack(
        [(nll * learnt).sum(1), ((own.argmax(-1) == batch.labels) & learnt).sum(1).float(), learnt.sum(1).float()], 1
    )
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_head_is_refused() -> None:
    model = tiny_lm("cohere")
    model.logit_scale = 0.5  # not what its configuration says
    with pytest.raises(ModelError, match="its logits are not its hidden states times its output embedding"):
        check_head(CausalLM(model))


def test_a_model_that_sees_later_positions_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertLMHeadModel(BertConfig(vocab_size=64, is_decoder=False, **shape)).eval()
    with pytest.raises(ModelError, match="BertLMHeadModel cannot be used"):
        check_head(CausalLM(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_mixing_with_lam_one_is_the_plain_forward(family: str) -> None:
    batch = training_batch(partner_ids=np.array([1, 0, 3, 2, 5, 4, 7, 6]), lam=np.ones(8, dtype=np.float32))
    lm = CausalLM(tiny_lm(family))
    with torch.no_grad():
        mixed, clean = lm.hidden(batch, Mixing()), lm.hidden(batch)
    kept = batch.attention_mask.bool()
    torch.testing.assert_close(mixed[kept], clean[kept], rtol=1e-5, atol=1e-5)


def test_swapping_a_pair_changes_nothing() -> None:
    partner, lam = np.array([1, 0, 3, 2, 5, 4, 7, 6]), np.full(8, 0.3, dtype=np.float32)
    lam[1::2] = 0.7
    batch = training_batch(partner_ids=partner, lam=lam)
    with torch.no_grad():
        mixed = CausalLM(tiny_lm()).hidden(batch, Mixing())
    torch.testing.assert_close(mixed[0::2], mixed[1::2], rtol=1e-5, atol=1e-5)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    save_lm(tmp_path / "teacher", "qwen2")
    student, _ = load_student_lm(Student(num_layers=1), Teacher(model=str(tmp_path / "teacher")), byte_tokenizer())
    assert student.head().weight is student.model.get_input_embeddings().weight
    assert student.config.num_hidden_layers == 1
    from_memory, _ = load_student_lm(Student(layers=[1]), tiny_lm("qwen2"), byte_tokenizer())
    assert from_memory.head().weight is from_memory.model.get_input_embeddings().weight
    hidden = student.hidden(training_batch())
    student.head().logits(hidden).square().sum().backward()
    gradient = student.model.get_input_embeddings().weight.grad
    assert gradient is not None and bool(gradient[200].abs().sum() > 0)  # of the output side: no row holds token 200


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_layers_of_the_teacher_make_a_student(tmp_path: Path, family: str) -> None:
    save_lm(tmp_path, family, num_hidden_layers=3)
    teacher = load_teacher_lm(Teacher(model=str(tmp_path)))
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training
    student, notes = load_student_lm(Student(layers=[0, 2]), Teacher(model=str(tmp_path)), byte_tokenizer())
    assert "[0, 2] of the 3" in notes[0]
    theirs = dict(teacher.model.named_parameters())
    for name, parameter in student.model.named_parameters():
        source = name.replace(".1.", ".2.") if ".layers.1." in name or ".h.1." in name else name
        torch.testing.assert_close(parameter, theirs[source], rtol=0, atol=0)


def test_teachers_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    tiny_lm("llama").model.save_pretrained(tmp_path)  # the body alone
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"do not make a causal language model: 1 tensors .* lm_head\.weight"):
        load_teacher_lm(Teacher(model=str(tmp_path)))


def test_a_described_student_has_a_living_end_of_text() -> None:
    """Where the pad token is the end-of-text token, its word embedding must not be a padding row."""
    tokenizer = byte_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    student, notes = load_student_lm(Student(config={**config, "intermediate_size": 48}), None, tokenizer, seed=5)
    words: Any = student.model.get_input_embeddings()
    assert words.padding_idx is None and bool(words.weight[tokenizer.eos_token_id].abs().sum() > 0)
    assert words.num_embeddings == 257 and notes == ["the student's weights are random (student.config)"]


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    byte_tokenizer(pad=False).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), purpose="causal_lm")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    with pytest.raises(ModelError, match="no padding token"):
        load_tokenizer(str(tmp_path))


def generated(lm: CausalLM, options: Sampling, seed: int = 0, rows: slice = slice(None)) -> torch.Tensor:
    batch = training_batch()
    lengths = batch.attention_mask.sum(1)
    ids, mask = left_padded_prompts(batch.input_ids[rows], lengths[rows], 0)
    return lm.generate(ids, mask, options, seed, torch.tensor([256]), 0)


def test_greedy_generation_is_the_arg_max_of_plain_forwards() -> None:
    lm, batch = CausalLM(tiny_lm()), training_batch()
    tokens = generated(lm, Sampling(max_new_tokens=5))
    assert not lm.model.training
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        ids = batch.input_ids[row : row + 1, :length]
        for place in range(5):
            with torch.no_grad():
                following = lm.model(input_ids=ids).logits[0, -1].argmax()
            assert tokens[row, place] == following
            if following == 256:
                break
            ids = torch.cat([ids, following.view(1, 1)], 1)


def test_sampling_is_a_function_of_its_seed() -> None:
    lm, options = CausalLM(tiny_lm()), Sampling(max_new_tokens=6, temperature=1.0)
    state = torch.get_rng_state()
    first, again, other = (generated(lm, options, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_stops_where_positions_end() -> None:
    width = int(training_batch().attention_mask.sum(1).max())
    assert generated(CausalLM(tiny_lm(max_position_embeddings=width + 4)), Sampling(max_new_tokens=50)).shape[1] <= 4
    with pytest.raises(ModelError, match="leaves the model no position"):
        generated(CausalLM(tiny_lm(max_position_embeddings=width)), Sampling(max_new_tokens=5))


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 50.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 4},
        {"min_new_tokens": 6},
        {"min_p": 0.9},
        {"typical_p": 0.01},
        {"return_dict_in_generate": True},
    ],
    ids=lambda own: next(iter(own)),
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_repository_recommends_is_not_what_is_drawn(own: dict[str, Any], temperature: float) -> None:
    lm, ids = CausalLM(tiny_lm()), torch.arange(1, 9)[None]

    def answer() -> list[int]:
        options = Sampling(max_new_tokens=8, temperature=temperature)
        every_second = torch.arange(0, 258, 2)
        answer: list[int] = lm.generate(ids, torch.ones_like(ids), options, 0, every_second, 257)[0].tolist()
        return answer

    plain, settings = answer(), lm.model.generation_config
    for name, value in own.items():
        setattr(settings, name, value)
    assert answer() == plain
    assert lm.model.generation_config is settings and {name: getattr(settings, name) for name in own} == own
