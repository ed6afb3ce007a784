"""The mixing face of a sequence-classification model: one forward on rows, one on mixed rows.

Works on any encoder whose word embeddings can be replaced by `inputs_embeds`; imports torch only.
Legend of shape suffixes: R rows of the batch, B clean rows, M mixed rows, L positions, E embedding width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixkd_fast.errors import ModelError
from mixkd_fast.mix import first_rows, interpolate, mix_embeddings, mixed_attention_mask, positions_of
from mixkd_fast.mixing import Mixing

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class Encoder(nn.Module):
    """A transformers sequence-classification model behind two calls, `clean` and `mixed`.

    The wrapped model is `.model`; nothing of it is changed or patched. Embedding tables that are plain and whole are
    mixed by the fused op; others are used by calling their modules, so that parameters partitioned by ZeRO-3 are
    gathered by its hooks.
    Raises: ModelError if the model's forward takes no `inputs_embeds`, or its word embeddings cannot be found.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # A wrapper is as much in training as what it wraps.
        self.training = model.training
        parameters = inspect.signature(model.forward).parameters
        if "inputs_embeds" not in parameters:
            raise ModelError(
                f"{self._kind} cannot be used: its forward takes no `inputs_embeds`, which mixing needs; use an "
                "encoder such as BERT, RoBERTa, DistilBERT, ELECTRA, ModernBERT or DeBERTa-v2"
            )
        words = getattr(model, "get_input_embeddings", lambda: None)()
        self._words_name = next((name for name, module in model.named_modules() if module is words), None)
        if self._words_name is None:
            raise ModelError(f"{self._kind} cannot be used: it has no table of word embeddings")
        types = getattr(self._container, "token_type_embeddings", None)
        self._type_table_known = hasattr(self._container, "token_type_embeddings")
        # A table of one row adds the same vector everywhere: the ids the tokenizer gives are not for this model.
        self._takes_types = "token_type_ids" in parameters and (types is None or types.num_embeddings > 1)
        self._takes_positions = "position_ids" in parameters

    @property
    def config(self) -> Any:
        """The transformers configuration of the wrapped model."""
        return self.model.config

    def clean(self, batch: Batch, **kwargs: Any) -> Any:
        """The plain forward on the batch's first num_rows rows.

        Args: kwargs reach the model (output_hidden_states, output_attentions, …).
        Returns: the model's ModelOutput; logits [B, C].
        """
        rows = slice(0, batch.num_rows)
        types = self._token_types(batch)
        return self.model(
            input_ids=batch.input_ids[rows],
            attention_mask=batch.attention_mask[rows],
            **({} if types is None else {"token_type_ids": types[rows]}),
            **kwargs,
        )

    def mixed(self, batch: Batch, mixing: Mixing, **kwargs: Any) -> Any:
        """The forward on the batch's M mixed rows.

        Row m mixes clean row m % B (weight lam[m]) with row partner[m] (weight 1 - lam[m]). Before LayerNorm:
        LN(lam * W_i + (1 - lam) * W_j + P + lam * Y_i + (1 - lam) * Y_j), W word, P position, Y token-type
        embeddings, then dropout; after LayerNorm: lam * O_i + (1 - lam) * O_j of the embedding module's outputs O,
        each with its own positions and its own draw of that module's dropout. lam = 1 equals `clean` exactly.
        With mixing.padding "zero" the W and Y (or O) of a padded position are 0.

        Args: batch with partner [M] and lam [M]; kwargs reach the model.
        Returns: the model's ModelOutput; logits [M, C].
        Raises: ModelError if this model cannot mix as `mixing` says.
        """
        assert batch.partner is not None and batch.lam is not None, "the batch carries no partners and no lam"
        mask = mixed_attention_mask(batch.attention_mask, batch.partner, batch.lam, batch.num_rows)
        if mixing.position == "after_layer_norm":
            return self._mixed_after_layer_norm(batch, mixing, mask, kwargs)
        return self._mixed_before_layer_norm(batch, mixing, mask, kwargs)

    def _mixed_before_layer_norm(self, batch: Batch, mixing: Mixing, mask_ML: Tensor, kwargs: dict[str, Any]) -> Any:
        assert batch.partner is not None and batch.lam is not None
        inputs: dict[str, Tensor] = {"attention_mask": mask_ML}
        types = self._token_types(batch)
        if types is not None:
            inputs["token_type_ids"] = self._own(types, batch)
        type_table = self._type_table(types) if mixing.padding == "zero" or types is not None else None
        if type_table is not None and types is None:
            types = torch.zeros_like(batch.input_ids)
        if all(_is_plain_table(table) for table in (self._words, type_table) if table is not None):
            inputs_embeds = self._mixed_by_the_op(batch, mixing, types, type_table)
        else:
            inputs_embeds = self._mixed_by_modules(batch, mixing, types, type_table)
        if self._counts_positions:
            # The model's own rule for ids, on the mixed rows: in the usual case their attention mask.
            padding_idx = self._container.padding_idx
            present = batch.input_ids.ne(padding_idx).to(torch.int64)
            present_ML = mixed_attention_mask(present, batch.partner, batch.lam, batch.num_rows)
            inputs["position_ids"] = positions_of(present_ML, padding_idx)
        return self.model(inputs_embeds=inputs_embeds, **inputs, **kwargs)

    def _mixed_by_the_op(
        self, batch: Batch, mixing: Mixing, types: Tensor | None, type_table: nn.Module | None
    ) -> Tensor:
        """lam * W_i + (1 - lam) * W_j + (lam * Y_i + (1 - lam) * Y_j - Y_i), to which the model adds Y_i."""
        assert batch.partner is not None and batch.lam is not None
        weight = None if type_table is None else _table(type_table)
        return mix_embeddings(
            batch.input_ids,
            _table(self._words),
            batch.partner,
            batch.lam,
            padding_mask=batch.attention_mask == 0 if mixing.padding == "zero" else None,
            # -Y_i in the place of positions, which the model adds itself.
            position_weight=None if weight is None else -weight,
            position_ids=None if weight is None or types is None else self._own(types, batch),
            token_type_ids=types if weight is not None else None,
            token_type_weight=weight,
            num_rows=batch.num_rows,
        )

    def _mixed_by_modules(
        self, batch: Batch, mixing: Mixing, types: Tensor | None, type_table: nn.Module | None
    ) -> Tensor:
        """The same by calls of the tables' modules: for partitioned ones, and for what is no plain table."""
        assert batch.partner is not None and batch.lam is not None
        first, second = self._pair(self._words(batch.input_ids), batch)
        padded = torch.zeros_like(first)
        if type_table is not None:
            own_types, partner_types = self._pair(type_table(types), batch)
            # The model adds Y_i at full weight to lam * W_i + (1 - lam) * (W_j + Y_j - Y_i); the difference is kept
            # in fp32 until `interpolate` rounds. A padded position that is to contribute zero is thus -Y_i.
            second = second + (partner_types.float() - own_types.float())
            padded = -own_types
        if mixing.padding == "zero":
            own_keep, partner_keep = self._pair(batch.attention_mask.bool()[..., None], batch)
            first, second = torch.where(own_keep, first, padded), torch.where(partner_keep, second, padded)
        return interpolate(first, second, batch.lam)

    def _mixed_after_layer_norm(self, batch: Batch, mixing: Mixing, mask_ML: Tensor, kwargs: dict[str, Any]) -> Any:
        assert batch.partner is not None
        first = {"input_ids": self._own(batch.input_ids, batch)}
        second = {"input_ids": batch.input_ids[batch.partner]}
        types = self._token_types(batch)
        if types is not None:
            first["token_type_ids"] = self._own(types, batch)
            second["token_type_ids"] = types[batch.partner]
        with self._embedding_output_mixed(batch, mixing, first["input_ids"], second):
            return self.model(**first, attention_mask=mask_ML, **kwargs)

    @contextmanager
    def _embedding_output_mixed(
        self, batch: Batch, mixing: Mixing, own_ids: Tensor, partner_inputs: dict[str, Tensor]
    ) -> Iterator[None]:
        module = self._embedding_module()
        signature = inspect.signature(module.forward)
        calls = 0

        def mix_with_partner(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            nonlocal calls
            bound = signature.bind(*args, **kwargs)
            # Another forward may pass through this module meanwhile, for example from a hook further in.
            if not _same_memory(bound.arguments.get("input_ids"), own_ids):
                return None
            calls += 1
            bound.arguments.update({k: v for k, v in partner_inputs.items() if k in signature.parameters})
            # `forward` and not the call: the partner's pass must not come back to this hook.
            pair = (output, module.forward(*bound.args, **bound.kwargs))
            if mixing.padding == "zero":
                keep = self._pair(batch.attention_mask, batch)
                pair = (pair[0] * keep[0][..., None], pair[1] * keep[1][..., None])
            assert batch.lam is not None
            return interpolate(*pair, batch.lam)

        handle = module.register_forward_hook(mix_with_partner, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        if calls != 1:
            raise ModelError(
                f'mixing.position "after_layer_norm" cannot be used with {self._kind}: its embedding module ran '
                f'{calls} times on the rows instead of once; use "before_layer_norm"'
            )

    def _embedding_module(self) -> nn.Module:
        container: nn.Module = self._container
        # A table directly in the model has no module of its own whose output could be mixed.
        if hasattr(container, "get_input_embeddings"):
            raise ModelError(
                f'mixing.position "after_layer_norm" cannot be used with {self._kind}: it has no embedding module '
                'around its word embeddings; use "before_layer_norm"'
            )
        return container

    def _own(self, rows_R: Tensor, batch: Batch) -> Tensor:
        assert batch.partner is not None
        return first_rows(rows_R, batch.partner.shape[0], batch.num_rows)

    def _pair(self, rows_R: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._own(rows_R, batch), rows_R[batch.partner]

    def _token_types(self, batch: Batch) -> Tensor | None:
        return batch.token_type_ids if self._takes_types else None

    def _type_table(self, types: Tensor | None) -> nn.Module | None:
        """The table whose rows the model adds to the word embeddings, or None if it adds none."""
        if types is not None and not self._type_table_known:
            raise ModelError(
                f"{self._kind} takes token types but not from a table beside its word embeddings, so they cannot be "
                'mixed; use a tokenizer without token types, or mixing.position "after_layer_norm"'
            )
        return getattr(self._container, "token_type_embeddings", None)

    @property
    def _container(self) -> Any:
        """The module around the table of word embeddings."""
        assert self._words_name is not None
        return self.model.get_submodule(self._words_name.rpartition(".")[0])

    @property
    def _words(self) -> nn.Module:
        assert self._words_name is not None
        return self.model.get_submodule(self._words_name)

    @property
    def _counts_positions(self) -> bool:
        """Whether the model counts positions over the ids that are not padding, which it cannot see in embeddings."""
        return self._takes_positions and hasattr(self._container, "create_position_ids_from_inputs_embeds")

    @property
    def _kind(self) -> str:
        return type(self.model).__name__


def _same_memory(tensor: Tensor | None, other: Tensor) -> bool:
    # Not `is`: the hooks of ZeRO-3 hand views of its arguments to a module.
    return tensor is not None and tensor.shape == other.shape and tensor.data_ptr() == other.data_ptr()


def _is_plain_table(module: nn.Module) -> bool:
    """Whether a module does no more than read rows of a table that lies here whole.

    Hooks may change what it gives; under ZeRO-3 they gather the table, which is otherwise one rank's part or empty.
    """
    if type(module) is not nn.Embedding or module._forward_hooks or module._forward_pre_hooks:
        return False
    plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return plain and not hasattr(module.weight, "ds_id")


def _table(module: nn.Module) -> Tensor:
    """The table of a plain module, whose padding row receives no gradient."""
    assert isinstance(module, nn.Embedding)
    if module.padding_idx is None or not (module.weight.requires_grad and torch.is_grad_enabled()):
        return module.weight
    frozen: Tensor = _WithoutGradientOfRow.apply(module.weight, module.padding_idx)
    return frozen


class _WithoutGradientOfRow(torch.autograd.Function):
    """A table as it is; in backward one of its rows gets gradient 0, as nn.Embedding does it for its padding row."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: int) -> Tensor:
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # In place: it was made for this one use of the table, and a copy would be as large as the table.
        gradient[ctx.row] = 0
        return gradient, None
