"""The mixing face of a sequence-classification model: a forward of the rows, of mixed rows, or of both at once.

Works on any encoder whose word embeddings can be replaced by `inputs_embeds`; imports torch only.
Legend of shape suffixes: R rows of the batch, B clean rows, M mixed rows, L positions, E embedding width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixkd_fast.encoder_parts import parts_of
from mixkd_fast.encoder_readings import Reading, reading_projections
from mixkd_fast.encoder_tables import is_plain_table, table_of
from mixkd_fast.errors import ModelError
from mixkd_fast.fused_encoder import FusedEncoder, Logits
from mixkd_fast.mix import first_rows, interpolate, mix_embeddings, mixed_attention_mask, positions_of
from mixkd_fast.mixing import Mixing

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class Encoder(nn.Module):
    """A transformers sequence-classification model behind three calls, `clean`, `mixed` and `both`.

    The wrapped model is `.model`; nothing of it is changed or patched. Embedding tables that are plain and whole are
    mixed by the fused op; others are used by calling their modules, so that parameters partitioned by ZeRO-3 are
    gathered by its hooks. After `fuse` the logits of a BERT-like model are computed by `FusedEncoder` where that is
    possible: no hooks, no partitioned parameters, no further outputs asked for.
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
        self.fused: FusedEncoder | None = None

    def fuse(self) -> str:
        """Compute logits by `FusedEncoder` from now on. Returns why that is not possible for this model, or ""."""
        parts = parts_of(self.model)
        if isinstance(parts, str):
            return parts
        self.fused = FusedEncoder(self.model, parts)
        return ""

    @property
    def config(self) -> Any:
        """The transformers configuration of the wrapped model."""
        return self.model.config

    def run(self, **inputs: Any) -> Any:
        """The model's own forward; every call of the model passes here."""
        return self.model(**inputs)

    def clean(self, batch: Batch, **kwargs: Any) -> Any:
        """The plain forward on the batch's first num_rows rows.

        Args: kwargs reach the model (output_hidden_states, output_attentions, …).
        Returns: the model's ModelOutput; logits [B, C].
        """
        if self._fusing(None, kwargs):
            return self._run_fused(batch, None, True)
        rows = slice(0, batch.num_rows)
        types = self._token_types(batch)
        return self.run(
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
        return self._mixed(batch, mixing, False, kwargs)

    def both(self, batch: Batch, mixing: Mixing, **kwargs: Any) -> tuple[Any, Any]:
        """What `clean` and `mixed` give, from one forward over B + M rows; dropout draws once for all of them.

        Returns: the ModelOutputs of the B clean and of the M mixed rows.
        """
        if mixing.padding == "zero" and batch.row_lengths is None:
            # Padding on the left: a clean row answers from a pad embedding, which must stay what it is.
            return self.clean(batch, **kwargs), self.mixed(batch, mixing, **kwargs)
        output, num_rows = self._mixed(batch, mixing, True, kwargs), batch.num_rows
        return select_rows(output, slice(0, num_rows)), select_rows(output, slice(num_rows, None))

    def read(
        self, batch: Batch, mixing: Mixing | None = None, *, layers: Sequence[int] = (), include_clean: bool = False
    ) -> Reading:
        """A forward with every layer's hidden states, and the queries, keys and values of some layers.

        Args: mixing None reads the clean rows, else the mixed ones, with include_clean the clean ones before them;
        layers = 0-based numbers. The model's own forward, so fused layers take no part.
        Raises: ModelError for a family whose projections are not known.
        """
        with reading_projections(self.model, layers) as projections:
            if mixing is None:
                output, mask = self.clean(batch, output_hidden_states=True), batch.attention_mask[: batch.num_rows]
            else:
                output = self._mixed(batch, mixing, include_clean, {"output_hidden_states": True})
                mask = self._mixed_mask(batch, include_clean)
            return Reading(output.logits, tuple(output.hidden_states), mask, projections())

    def embedded(self, batch: Batch, word_embeddings: Tensor, **kwargs: Any) -> Any:
        """The forward of the clean rows with other word embeddings in their place; gradients reach them.

        Args: word_embeddings [B, L, E], to which the model adds positions and token types; kwargs reach the model.
        Returns: the model's ModelOutput; logits [B, C].
        """
        rows = slice(0, batch.num_rows)
        inputs: dict[str, Tensor] = {"attention_mask": batch.attention_mask[rows]}
        types = self._token_types(batch)
        if types is not None:
            inputs["token_type_ids"] = types[rows]
        if self._counts_positions:
            padding_idx = self._container.padding_idx
            inputs["position_ids"] = positions_of(batch.input_ids[rows].ne(padding_idx).to(torch.int64), padding_idx)
        return self.run(inputs_embeds=word_embeddings, **inputs, **kwargs)

    @property
    def word_table(self) -> nn.Module:
        """The module whose rows are the word embeddings."""
        return self._words

    def _mixed_mask(self, batch: Batch, include_clean: bool) -> Tensor:
        assert batch.partner is not None and batch.lam is not None
        mask = mixed_attention_mask(batch.attention_mask, batch.partner, batch.lam, batch.num_rows)
        return torch.cat([batch.attention_mask[: batch.num_rows], mask]) if include_clean else mask

    def _mixed(self, batch: Batch, mixing: Mixing, include_clean: bool, kwargs: dict[str, Any]) -> Any:
        """One forward of the mixed rows, the clean ones before them with include_clean."""
        assert batch.partner is not None and batch.lam is not None, "the batch carries no partners and no lam"
        if self._fusing(mixing, kwargs):
            return self._run_fused(batch, mixing, include_clean)
        mask = self._mixed_mask(batch, include_clean)
        if mixing.position == "after_layer_norm":
            return self._mixed_after_layer_norm(batch, mixing, mask, include_clean, kwargs)
        return self._mixed_before_layer_norm(batch, mixing, mask, include_clean, kwargs)

    def _fusing(self, mixing: Mixing | None, kwargs: dict[str, Any]) -> bool:
        if self.fused is None or kwargs or (mixing is not None and mixing.position != "before_layer_norm"):
            return False
        return not self.fused.why_not_now()

    def _run_fused(self, batch: Batch, mixing: Mixing | None, include_clean: bool) -> Any:
        assert self.fused is not None
        return self.fused(batch, mixing, include_clean, self._token_types(batch))

    def _mixed_before_layer_norm(
        self, batch: Batch, mixing: Mixing, mask_OL: Tensor, include_clean: bool, kwargs: dict[str, Any]
    ) -> Any:
        assert batch.partner is not None and batch.lam is not None
        inputs: dict[str, Tensor] = {"attention_mask": mask_OL}
        types = self._token_types(batch)
        if types is not None:
            inputs["token_type_ids"] = self._own(types, batch, include_clean)
        type_table = self._type_table(types) if mixing.padding == "zero" or types is not None else None
        if type_table is not None and types is None:
            types = torch.zeros_like(batch.input_ids)
        if all(is_plain_table(table) for table in (self._words, type_table) if table is not None):
            inputs_embeds = self._mixed_by_the_op(batch, mixing, types, type_table, include_clean)
        else:
            inputs_embeds = self._mixed_by_modules(batch, mixing, types, type_table, include_clean)
        if self._counts_positions:
            # The model's own rule for ids, on the mixed rows: in the usual case their attention mask.
            padding_idx = self._container.padding_idx
            present = batch.input_ids.ne(padding_idx).to(torch.int64)
            present_OL = mixed_attention_mask(present, batch.partner, batch.lam, batch.num_rows)
            if include_clean:
                present_OL = torch.cat([present[: batch.num_rows], present_OL])
            inputs["position_ids"] = positions_of(present_OL, padding_idx)
        return self.run(inputs_embeds=inputs_embeds, **inputs, **kwargs)

    def _mixed_by_the_op(
        self, batch: Batch, mixing: Mixing, types: Tensor | None, type_table: nn.Module | None, include_clean: bool
    ) -> Tensor:
        """lam * W_i + (1 - lam) * W_j + (lam * Y_i + (1 - lam) * Y_j - Y_i), to which the model adds Y_i."""
        assert batch.partner is not None and batch.lam is not None
        weight = None if type_table is None else table_of(type_table)
        return mix_embeddings(
            batch.input_ids,
            table_of(self._words),
            batch.partner,
            batch.lam,
            padding_mask=batch.attention_mask == 0 if mixing.padding == "zero" else None,
            # -Y_i in the place of positions, which the model adds itself.
            position_weight=None if weight is None else -weight,
            position_ids=None if weight is None or types is None else self._own(types, batch, include_clean),
            token_type_ids=types if weight is not None else None,
            token_type_weight=weight,
            include_clean=include_clean,
            num_rows=batch.num_rows,
        )

    def _mixed_by_modules(
        self, batch: Batch, mixing: Mixing, types: Tensor | None, type_table: nn.Module | None, include_clean: bool
    ) -> Tensor:
        """The same by calls of the tables' modules: for partitioned ones, and for what is no plain table."""
        assert batch.partner is not None and batch.lam is not None
        words = self._words(batch.input_ids)
        first, second = self._pair(words, batch)
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
        mixed = interpolate(first, second, batch.lam)
        return torch.cat([words[: batch.num_rows], mixed]) if include_clean else mixed

    def _mixed_after_layer_norm(
        self, batch: Batch, mixing: Mixing, mask_OL: Tensor, include_clean: bool, kwargs: dict[str, Any]
    ) -> Any:
        assert batch.partner is not None
        first = {"input_ids": self._own(batch.input_ids, batch, include_clean)}
        second = {"input_ids": batch.input_ids[batch.partner]}
        types = self._token_types(batch)
        if types is not None:
            first["token_type_ids"] = self._own(types, batch, include_clean)
            second["token_type_ids"] = types[batch.partner]
        with self._embedding_output_mixed(batch, mixing, first["input_ids"], second):
            return self.run(**first, attention_mask=mask_OL, **kwargs)

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
            # Clean rows, if there are any, come first; attention masks among the arguments end with the mixed rows'.
            num_clean = own_ids.shape[0] - partner_inputs["input_ids"].shape[0]
            for name, value in bound.arguments.items():
                if num_clean and isinstance(value, Tensor) and value.shape[:1] == own_ids.shape[:1]:
                    bound.arguments[name] = value[num_clean:]
            bound.arguments.update({k: v for k, v in partner_inputs.items() if k in signature.parameters})
            # `forward` and not the call: the partner's pass must not come back to this hook.
            pair = (output[num_clean:], module.forward(*bound.args, **bound.kwargs))
            if mixing.padding == "zero":
                keep = self._pair(batch.attention_mask, batch)
                pair = (pair[0] * keep[0][..., None], pair[1] * keep[1][..., None])
            assert batch.lam is not None
            mixed = interpolate(*pair, batch.lam)
            return torch.cat([output[:num_clean], mixed]) if num_clean else mixed

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

    def _own(self, rows_R: Tensor, batch: Batch, include_clean: bool = False) -> Tensor:
        """The first row of each pair, the clean rows before them with include_clean."""
        assert batch.partner is not None
        own = first_rows(rows_R, batch.partner.shape[0], batch.num_rows)
        return torch.cat([rows_R[: batch.num_rows], own]) if include_clean else own

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


def select_rows(output: Any, rows: slice) -> Any:
    """Some rows of everything a model gives: of a ModelOutput, of tuples of tensors, of tensors."""
    if isinstance(output, Tensor):
        return output[rows]
    if isinstance(output, Logits):
        return Logits(output.logits[rows])
    if isinstance(output, tuple | list):
        return type(output)(select_rows(part, rows) for part in output)
    if isinstance(output, Mapping):
        return type(output)(**{name: select_rows(part, rows) for name, part in output.items()})
    return output


def _same_memory(tensor: Tensor | None, other: Tensor) -> bool:
    # Not `is`: the hooks of ZeRO-3 hand views of its arguments to a module.
    return tensor is not None and tensor.shape == other.shape and tensor.data_ptr() == other.data_ptr()
