"""The face of a transformers causal language model: hidden states, output head, generation. Imports torch only.

Legend of shape suffixes: R rows of the batch, B clean rows, M mixed rows, L positions, H width, C classes (the padded
vocabulary), P positions of the prompts, T generated tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixkd_fast.data.next_tokens import IGNORED
from mixkd_fast.encoder_tables import is_plain_table, table_of
from mixkd_fast.errors import ModelError
from mixkd_fast.language_task import Sampling
from mixkd_fast.mix import first_rows, interpolate, mix_embeddings, mixed_attention_mask
from mixkd_fast.mixing import Mixing

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch

NUM_ANSWERS = 3
"""Figures per row of `CausalLM.answers`."""
_LOGITS_AT_ONCE = 1 << 25


class Head(NamedTuple):
    """The output layer: logits = softcap * tanh(z / softcap), z = scale * (h W^T + b)."""

    weight: Tensor
    """[C, H]; the word embeddings themselves where they are tied."""
    bias: Tensor | None
    softcap: float | None
    """None: logits = z"""
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., C], in the dtype of the product."""
        logits = self.scale * F.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def in_fp32(self) -> Head:
        """The same with weight and bias in fp32."""
        return self._replace(weight=self.weight.float(), bias=None if self.bias is None else self.bias.float())


def head_of(output: Any, config: Any) -> Head:
    """An output embedding as the model's configuration says that it is applied."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(text, "final_logit_softcapping", None)
    scale = getattr(text, "logit_scale", None) or 1.0
    scale *= getattr(text, "lm_head_multiplier", None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0
    bias = getattr(output, "bias", None)
    return Head(output.weight, bias, None if softcap is None else float(softcap), float(scale))


class CausalLM(nn.Module):
    """A transformers causal language model behind `hidden`, `head`, `answers` and `generate`.

    The wrapped model is `.model`; nothing of it is changed or patched. Rows are padded on the right in training and
    evaluation: no position sees a later one, so their padding needs no mask, and none is given to the model.
    Raises: ModelError if the model has no body and no output embedding that could be told apart.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        # A wrapper is as much in training as what it wraps.
        self.training = model.training
        output = getattr(model, "get_output_embeddings", lambda: None)()
        if output is None or getattr(model, "base_model", model) is model:
            raise ModelError(
                f"{type(model).__name__} cannot be used: it is not a causal language model with a body and an output "
                "embedding"
            )

    @property
    def config(self) -> Any:
        """The transformers configuration of the wrapped model."""
        return self.model.config

    def hidden(self, batch: Batch, mixing: Mixing | None = None) -> Tensor:
        """Last hidden states after the final norm, the head not applied: [B, L, H] of the clean rows.

        Args: mixing = of the M mixed rows instead, [M, L, H]: word embeddings lam * e(x_i) + (1 - lam) * e(x_j) at
        every position, to which the model adds what it adds to any. lam = 1 equals the clean rows.
        """
        if mixing is None:
            rows = slice(0, batch.num_rows)
            return self._body(batch, batch.attention_mask[rows], input_ids=batch.input_ids[rows])
        assert batch.partner is not None and batch.lam is not None, "the batch carries no partners and no lam"
        mask = mixed_attention_mask(batch.attention_mask, batch.partner, batch.lam, batch.num_rows)
        return self._body(batch, mask, inputs_embeds=self._mixed_words(batch, mixing))

    def _body(self, batch: Batch, mask: Tensor, **inputs: Tensor) -> Tensor:
        if batch.row_lengths is None:  # padded on the left, or not known to be padded on the right
            inputs["attention_mask"] = mask
        hidden: Tensor = self.model.base_model(**inputs, use_cache=False, return_dict=True)[0]
        return hidden

    def _mixed_words(self, batch: Batch, mixing: Mixing) -> Tensor:
        """[M, L, E]"""
        assert batch.partner is not None and batch.lam is not None
        words: Any = self.model.get_input_embeddings()
        padding_mask = batch.attention_mask == 0 if mixing.padding == "zero" else None
        if is_plain_table(words):
            return mix_embeddings(
                batch.input_ids,
                table_of(words),
                batch.partner,
                batch.lam,
                padding_mask=padding_mask,
                num_rows=batch.num_rows,
            )
        embedded = words(batch.input_ids)
        if padding_mask is not None:
            embedded = embedded.masked_fill(padding_mask[..., None], 0.0)
        own = first_rows(embedded, batch.partner.shape[0], batch.num_rows)
        return interpolate(own, embedded[batch.partner], batch.lam)

    def head(self) -> Head:
        """The output layer; of a model that ZeRO-3 partitions inside its engine's forward or `gathered_head` only."""
        return head_of(self.model.get_output_embeddings(), self.config)

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters that `head` reads."""
        output: Any = self.model.get_output_embeddings()
        return list(output.parameters(recurse=False))

    def _classes_from(self, num_tokens: int | None) -> list[int]:
        """The classes of the output layer from this one on, for None none."""
        weight: Any = self.model.get_output_embeddings()
        weight = weight.weight
        num_classes = int(getattr(weight, "ds_shape", weight.shape)[0])  # a partitioned one has no shape of its own
        return [] if num_tokens is None else list(range(num_tokens, num_classes))

    @contextmanager
    def gathered_head(self) -> Iterator[None]:
        """Here `head` is whole: nothing is to be done for a model in memory."""
        with nullcontext():
            yield

    def logits(self, batch: Batch) -> Tensor:
        """[B, L, C] of the clean rows, all positions: for small vocabularies and tests."""
        return self.head().logits(self.hidden(batch))

    def answers(self, batch: Batch) -> Tensor:
        """What an evaluation needs of every clean row: fp32 [B, 3] sums over the row's targets.

        The negative log-likelihood in nats, the correct arg max predictions, and the number of targets.
        """
        return answers_of(self.hidden(batch), self.head(), batch.labels[: batch.num_rows])

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        options: Sampling,
        seed: int,
        eos_ids: Tensor,
        pad_id: int,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Continue prompts, batched and with a key-value cache: int64 [R, T], T at most options.max_new_tokens.

        A row that has ended holds pad_id after its first end-of-text token; `next_tokens.generated_mask` tells.
        Args: prompt_ids, prompt_mask int64 [R, P], padded on the left; seed = of all draws, the global generator is
        left as it was; eos_ids int64 [any number]; num_tokens = never give a token of this number or above, which a
        padded vocabulary has and another model may not.
        A collective call if the model is partitioned by ZeRO-3: every rank generates until the last one is done.
        """
        model: Any = self.model
        was_training = model.training
        model.eval()
        limit = getattr(self.config, "max_position_embeddings", None)
        room = options.max_new_tokens if not limit else min(options.max_new_tokens, limit - prompt_ids.shape[1])
        if room < 1:
            raise ModelError(f"a prompt of {prompt_ids.shape[1]} tokens leaves the model no position for an answer")
        drawn = options.temperature > 0
        chosen = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p} if drawn else {}
        settings = type(model.generation_config)(
            max_new_tokens=room,
            do_sample=drawn,
            eos_token_id=eos_ids.tolist() or None,
            pad_token_id=pad_id,
            use_cache=True,
            suppress_tokens=self._classes_from(num_tokens) or None,
            **chosen,
        )
        devices = [prompt_ids.device] if prompt_ids.device.type == "cuda" else []
        partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        try:
            with torch.random.fork_rng(devices=devices), _plainly_generating(model, limit):
                torch.manual_seed(seed)
                generated: Tensor = model.generate(
                    input_ids=prompt_ids,
                    attention_mask=prompt_mask,
                    generation_config=settings,
                    synced_gpus=partitioned,
                )
        finally:
            model.train(was_training)
        return generated[:, prompt_ids.shape[1] :]

    @torch.no_grad()
    def probe(self, device: torch.device) -> Probe:
        """What `check_probe` compares, fp32 but for the hidden states. Collective if partitioned."""
        model, was_training = self.model, self.training
        words = int(model.get_input_embeddings().num_embeddings)
        ids = torch.arange(1, 9, device=device).remainder(words)[None]
        self.eval()
        try:
            own = model(input_ids=ids, use_cache=False).logits.float()
            hidden = model.base_model(input_ids=ids, use_cache=False, return_dict=True)[0]
            shorter = model(input_ids=ids[:, :5], use_cache=False).logits.float()
        finally:
            self.train(was_training)
        return Probe(own, hidden, shorter)

    @torch.no_grad()
    def next_logits(self, new_ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Logits [R, C] of what follows the tokens so far, and the key-value cache that the next call wants.

        Args: new_ids int64 [R, n], the tokens that are not in the cache yet (the whole prompts, padded on the left,
        when there is none); mask int64 [R, all tokens so far].
        """
        inputs = {"input_ids": new_ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        known = inspect.signature(self.model.forward).parameters
        if "position_ids" in known:  # others count the mask themselves
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -new_ids.shape[1] :]
        if "logits_to_keep" in known:
            inputs["logits_to_keep"] = 1
        found = self.model(**inputs, return_dict=True)
        return found.logits[:, -1], found.past_key_values


@contextmanager
def _plainly_generating(model: Any, limit: int | None) -> Iterator[None]:
    """Here the model has no generation settings of its own, with which transformers fills in what a call leaves open,
    and takes positions beyond its limit for its last one: it may have to go on where other ranks have room left.
    """

    def within(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if limit and named.get("position_ids") is not None:
            named = {**named, "position_ids": named["position_ids"].clamp(max=limit - 1)}
        return arguments, named

    own = model.generation_config
    model.generation_config = type(own)()
    hook = model.register_forward_pre_hook(within, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        model.generation_config = own


def answers_of(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """`CausalLM.answers` from hidden states [B, L, H] and labels [B, L]: fp32 [B, 3]."""
    learnt = labels != IGNORED
    rows_K, labels_K = learnt.nonzero()[:, 0], labels[learnt]
    # A few tokens at a time: logits of all of them can be larger than the model.
    at_once = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
    sums = torch.zeros(len(labels), NUM_ANSWERS, dtype=torch.float64, device=labels.device)
    for hidden_kH, rows_k, labels_k in zip(
        *(x.split(at_once) for x in (hidden[learnt], rows_K, labels_K)), strict=True
    ):
        logits = head.logits(hidden_kH.to(head.weight.dtype)).float()
        nll = F.cross_entropy(logits, labels_k, reduction="none")
        figures = torch.stack([nll, logits.argmax(-1) == labels_k, torch.ones_like(nll)], 1)
        sums.index_add_(0, rows_k, figures.double())
    return sums.float()


class Probe(NamedTuple):
    """A few tokens as a model itself answers them, and its hidden states of them."""

    own: Tensor
    """[1, L, C]"""
    hidden: Tensor
    """[1, L, H]"""
    shorter: Tensor
    """[1, fewer, C]: of the first tokens alone."""


def check_head(lm: CausalLM) -> None:
    """Refuse a model whose own logits are not what `head` makes of its hidden states, or not causal.

    One forward of a few tokens each way, where the model is, with whole (not partitioned) parameters. It catches
    families that do more to their logits than `head` knows.
    """
    if can_probe(lm):
        check_probe(lm, lm.probe(next(lm.parameters()).device))


def can_probe(lm: CausalLM) -> bool:
    """Others (flash attention) need a GPU and half precision."""
    return getattr(lm.config, "_attn_implementation", None) in ("eager", "sdpa", None)


def check_probe(lm: CausalLM, found: Probe) -> None:
    """`check_head` of what `CausalLM.probe` gave, with the head whole."""
    kind, own = type(lm.model).__name__, found.own
    with torch.no_grad():
        ours = lm.head().logits(found.hidden).float()
    tolerance = 1e-4 if next(lm.parameters()).dtype == torch.float32 else 3e-2
    if ours.shape != own.shape or not torch.allclose(ours, own, rtol=tolerance, atol=tolerance):
        raise ModelError(
            f"{kind} cannot be used: its logits are not its hidden states times its output embedding (with the bias, "
            "scale and soft-cap of its configuration)"
        )
    if not torch.allclose(own[:, : found.shorter.shape[1]], found.shorter, rtol=tolerance, atol=tolerance):
        raise ModelError(f"{kind} cannot be used: its positions see later ones, so it is no causal language model")
