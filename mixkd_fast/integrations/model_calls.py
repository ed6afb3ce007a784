"""How a trainer's models are called: with the inputs that each knows, through whatever the trainer wrapped around it.

Legend of shape suffixes: B rows, L positions, H width.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixkd_fast.causal_lm import Head, head_of
from mixkd_fast.encoder import Encoder
from mixkd_fast.errors import ModelError

# Columns that are no inputs of a forward that computes no loss.
_TARGETS = ("labels", "shift_labels", "label", "label_ids", "num_items_in_batch")
# A head's logits of a few positions against the model's own; half precision rounds them.
_HEAD_TOLERANCE = 0.05


def core_of(model: Any) -> Any:
    """The transformers model itself: without the adapter's wrapper (PEFT) and without what is distributed around it."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parameters_of(model: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a model's forward."""
    return dict(inspect.signature(core_of(model).forward).parameters)


class ModelCall:
    """A model's forward on a batch of a trainer, whose columns are those of student and teacher together."""

    def __init__(self, model: Any) -> None:
        self.core = core_of(model)
        self._parameters = parameters_of(model)
        self._takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._parameters.values())
        self._head_is_checked = False

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that this model takes; no labels, so that it computes no loss of its own."""
        return {name: value for name, value in batch.items() if self._takes(name)}

    def logits(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> Any:
        """The ModelOutput of `model`, which is this one or a wrapper around it."""
        return model(**self.inputs(batch), **self._without_cache())

    @property
    def gives_hidden_states(self) -> bool:
        """Whether the forward can leave the head's product out, but for the positions asked for."""
        base = getattr(self.core, "base_model", self.core)
        # An adapter on the head, or a quantized one, is more than its weight.
        plain_head = type(self._output_embeddings) is nn.Linear
        return base is not self.core and "logits_to_keep" in self._parameters and plain_head

    def hidden_states(
        self, model: Callable[..., Any], batch: Mapping[str, Any], logits_to_keep: int
    ) -> tuple[Any, Any]:
        """The last hidden states [B, L, H], as the head gets them, and the ModelOutput with the last positions' logits.

        One forward of the outermost module, so that distributed wrappers see all of it, the head as well. With
        logits_to_keep 0 it has all logits.
        """
        with _output_of(self.core.base_model) as outputs:
            output = model(**self.inputs(batch), **self._without_cache(), logits_to_keep=logits_to_keep)
        if len(outputs) != 1:
            raise ModelError(
                f"{type(self.core).__name__}: its base model ran {len(outputs)} times in one forward instead of once; "
                "use KDLoss, which needs no hidden states"
            )
        hidden_BLH = outputs[0]
        if not self._head_is_checked:
            self._check_head(hidden_BLH, output.logits)
            self._head_is_checked = True
        return hidden_BLH, output

    @property
    def head(self) -> Head:
        """The output embedding as the model's configuration says that it is applied."""
        return head_of(self._output_embeddings, self.core.config)

    @property
    def _output_embeddings(self) -> Any:
        return getattr(self.core, "get_output_embeddings", lambda: None)()

    def _check_head(self, hidden_BLH: Tensor, logits: Tensor) -> None:
        """Once: a model may do more between its last hidden states and its logits than a head with scale and cap."""
        with torch.no_grad(), head_in_memory(self.head):
            ours = self.head.in_fp32().logits(hidden_BLH[:, -1:].float())
            own = logits[:, -1:].to(ours.dtype)
            error, size = (ours - own).abs().max(), own.abs().max()
            if not bool(error <= _HEAD_TOLERANCE * (1 + size)):
                raise ModelError(
                    f"{type(self.core).__name__}: its logits are not those of its output embedding on its last hidden "
                    f"states (largest difference {error:.3g}); use KDLoss, which needs neither"
                )

    def _takes(self, name: str) -> bool:
        if name in _TARGETS:
            return False
        # Attention kernels get their arguments through **kwargs; a model without token types must not get any.
        return name in self._parameters or (self._takes_any and name != "token_type_ids")

    def _without_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if "use_cache" in self._parameters else {}


@contextmanager
def head_in_memory(*heads: Head) -> Iterator[None]:
    """Whole weights of heads that ZeRO-3 has partitioned, for reading."""
    parameters = [part for head in heads for part in (head.weight, head.bias) if hasattr(part, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


class WrappedEncoder(Encoder):
    """An `Encoder` whose forwards enter by the module that a trainer has wrapped around its model.

    There gradients are reduced over processes and partitioned parameters gathered. `entrance` is that module; the
    model itself until it is set.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(core_of(model))
        # In a tuple: it contains the model already, and torch would register it once more.
        self._entrance: tuple[Any, ...] = (model,)

    def through(self, entrance: Any) -> "WrappedEncoder":
        """The same, entering by another module from now on."""
        self._entrance = (entrance,)
        return self

    def run(self, **inputs: Any) -> Any:
        return self._entrance[0](**inputs)


@contextmanager
def _output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module gives as its first output, call by call."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
