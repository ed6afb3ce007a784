"""mix_embeddings on every backend of the CPU: values and gradients against fp64, identities, refusals.

Legend of shape suffixes: R rows of ids, B clean rows, M mixed rows, L positions, H width.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixkd_fast.mix import mix_embeddings
from mixkd_fast.ops import MixInputs

pytestmark = pytest.mark.usefixtures("each_backend")

WORDS, PLACES, TYPES = 23, 40, 3
STORED = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-13}
"""Relative rounding of a stored value."""
PARTS: list[set[str]] = [
    set(),
    {"padding"},
    {"place"},
    {"type", "padding"},
    {"norm"},
    {"place", "type", "norm"},
    {"place", "type", "norm", "padding", "place_ids", "clean"},
]


def make_batch(
    parts: set[str], dtype: torch.dtype, rows: int = 5, mixed: int = 5, length: int = 7, width: int = 12, seed: int = 0
) -> dict[str, Any]:
    """Arguments of mix_embeddings; `parts` says what is given."""
    generator = torch.Generator().manual_seed(seed)

    def table(size: int) -> Tensor:
        return torch.randn(size, width, generator=generator).to(dtype).requires_grad_()

    def indices(size: int, *shape: int) -> Tensor:
        return torch.randint(size, shape, generator=generator)

    lam = torch.rand(mixed, generator=generator)
    lam[:2] = torch.tensor([0.0, 1.0])[: len(lam[:2])]
    arguments: dict[str, Any] = {
        "input_ids": indices(WORDS, rows, length),
        "weight": table(WORDS),
        "partner": indices(rows, mixed),
        "lam": lam,
        "num_rows": min(rows, mixed),
        "include_clean": "clean" in parts,
    }
    if "padding" in parts:
        arguments["padding_mask"] = torch.rand(rows, length, generator=generator) < 0.3
    if "place" in parts:
        arguments["position_weight"] = table(PLACES)
    if "place_ids" in parts:
        output_rows = mixed + (arguments["num_rows"] if "clean" in parts else 0)
        arguments["position_ids"] = indices(PLACES, output_rows, length)
    if "type" in parts:
        arguments |= {"token_type_ids": indices(TYPES, rows, length), "token_type_weight": table(TYPES)}
    if "norm" in parts:
        norm = nn.LayerNorm(width, eps=1e-12, dtype=dtype)
        with torch.no_grad():
            norm.weight.normal_(1.0, 0.3, generator=generator)
            norm.bias.normal_(0.0, 0.3, generator=generator)
        arguments["layer_norm"] = norm
    return arguments


def tables_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that receives a gradient."""
    tables = {name: value for name, value in arguments.items() if name.endswith("weight")}
    if "layer_norm" in arguments:
        tables |= {f"norm {name}": value for name, value in arguments["layer_norm"].named_parameters()}
    return tables


def true_embeddings(arguments: dict[str, Any]) -> Tensor:
    """The definition, row by row and token by token, in fp64 from leaves that `arguments` hold."""
    num_rows, partner = arguments["num_rows"], arguments["partner"].tolist()
    pairs = [(m % num_rows, j, lam) for m, (j, lam) in enumerate(zip(partner, arguments["lam"].tolist(), strict=True))]
    if arguments["include_clean"]:
        pairs = [(i, i, 1.0) for i in range(num_rows)] + pairs
    rows = []
    for o, (i, j, lam) in enumerate(pairs):
        tokens = []
        for place in range(arguments["input_ids"].shape[1]):
            x = torch.zeros(arguments["weight"].shape[1], dtype=torch.float64)
            for row, share in ((i, lam), (j, 1 - lam)):
                if share == 0 or ("padding_mask" in arguments and arguments["padding_mask"][row, place]):
                    continue
                x = x + share * arguments["weight"][arguments["input_ids"][row, place]].double()
                if "token_type_ids" in arguments:
                    kind = arguments["token_type_ids"][row, place]
                    x = x + share * arguments["token_type_weight"][kind].double()
            if "position_weight" in arguments:
                ids = arguments.get("position_ids")
                x = x + arguments["position_weight"][place if ids is None else ids[o, place]].double()
            tokens.append(x)
        rows.append(torch.stack(tokens))
    output = torch.stack(rows)
    if "layer_norm" in arguments:
        norm = arguments["layer_norm"]
        output = F.layer_norm(output, output.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)
    return output


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with fp64 leaves: a gradient of bf16 leaves would be rounded token by token."""
    doubled = dict(arguments)
    for name, value in arguments.items():
        if name.endswith("weight"):
            doubled[name] = value.detach().double().requires_grad_()
    if "layer_norm" in arguments:
        norm = arguments["layer_norm"]
        doubled["layer_norm"] = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, dtype=torch.float64)
        doubled["layer_norm"].load_state_dict({name: value.double() for name, value in norm.state_dict().items()})
    return doubled


def outputs_and_gradients(arguments: dict[str, Any], output: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """The output and each table's gradient for grad_output, in fp64."""
    tables = tables_of(arguments)
    gradients = torch.autograd.grad(output, list(tables.values()), grad_output.to(output.dtype))
    return {"output": output.detach().double()} | {n: g.double() for n, g in zip(tables, gradients, strict=True)}


@pytest.mark.parametrize("dtype", list(STORED), ids=str)
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(sorted(parts)) or "words")
def test_values_and_gradients_against_the_definition(parts: set[str], dtype: torch.dtype) -> None:
    for rows, mixed, length, width in ((5, 5, 7, 12), (1, 1, 1, 1), (3, 6, 2, 65), (6, 4, 17, 7), (4, 4, 3, 384)):
        arguments = make_batch(parts, dtype, rows, mixed, length, width)
        if "norm" in parts and width == 1:
            continue  # LayerNorm of one number is its bias
        output = mix_embeddings(**arguments)
        assert output.dtype == dtype
        generator = torch.Generator().manual_seed(1)
        grad_output = (torch.randn(output.shape, generator=generator) * 2.5).to(dtype)
        actual = outputs_and_gradients(arguments, output, grad_output)
        exact = in_double(arguments)
        expected = outputs_and_gradients(exact, true_embeddings(exact), grad_output.double())
        for name, value in expected.items():
            error = (actual[name] - value).norm() / value.norm().clamp(min=1e-30)
            assert error <= STORED[dtype], f"{name} of {rows}x{mixed}x{length}x{width}: {error}"


def test_lam_1_is_the_plain_embedding_bit_for_bit() -> None:
    arguments = make_batch({"type", "place", "norm"}, torch.float32)
    arguments["lam"] = torch.ones(5)
    places = arguments["position_weight"][:7]
    plain = F.embedding(arguments["input_ids"], arguments["weight"])
    words_only = {name: arguments[name] for name in ("input_ids", "weight", "partner", "lam")}
    torch.testing.assert_close(mix_embeddings(**words_only), plain, rtol=0, atol=0)
    whole = plain + (places + F.embedding(arguments["token_type_ids"], arguments["token_type_weight"]))
    torch.testing.assert_close(mix_embeddings(**arguments), arguments["layer_norm"](whole), rtol=1e-6, atol=1e-6)
    # A position of minus the type leaves the word itself.
    arguments["position_weight"] = -arguments["token_type_weight"][:1].expand(7, -1)
    arguments["token_type_ids"] = torch.zeros(5, 7, dtype=torch.long)
    del arguments["layer_norm"]
    torch.testing.assert_close(mix_embeddings(**arguments), plain, rtol=0, atol=0)


def test_one_number_as_lam_and_the_clean_rows_first() -> None:
    arguments = make_batch({"place", "norm"}, torch.float32)
    arguments["lam"] = 0.3
    both = mix_embeddings(**(arguments | {"include_clean": True}))
    torch.testing.assert_close(both[5:], mix_embeddings(**arguments), rtol=0, atol=0)
    torch.testing.assert_close(both[:5], mix_embeddings(**(arguments | {"lam": 1.0})), rtol=0, atol=0)


def test_what_has_weight_0_is_not_looked_at() -> None:
    """A NaN in a table row that only sides of weight 0 or padding point to."""
    arguments = make_batch({"type", "norm", "padding", "place"}, torch.float32)
    ids, partner = arguments["input_ids"], arguments["partner"]
    ids[ids == 22] = 21
    partner[:] = torch.tensor([1, 2, 3, 4, 0])
    arguments["lam"] = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.0])
    arguments["padding_mask"][:] = False
    # Row 0 meets row 1 at lam 1, row 4 meets row 0 at lam 0: row 1 and row 4 do not count there, but row 1 does below.
    arguments["lam"][1:4] = 1.0
    ids[4, 2] = 22
    arguments["padding_mask"][3, 5] = True
    ids[3, 5] = 22
    with torch.no_grad():
        arguments["weight"][22] = float("nan")
    output = mix_embeddings(**arguments)
    assert output.isfinite().all()
    gradients = torch.autograd.grad(output.square().sum(), list(tables_of(arguments).values()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_nan_stays_where_it_is() -> None:
    arguments = make_batch({"place", "norm"}, torch.float32)
    with torch.no_grad():
        arguments["position_weight"][3] = float("nan")
    output = mix_embeddings(**arguments)
    assert output[:, 3].isnan().all()
    assert output[:, [0, 1, 2, 4, 5, 6]].isfinite().all()


def test_a_token_ten_thousand_times() -> None:
    """The gradient of a frequent word is a long sum: in fp32, whatever the table's dtype."""
    ids = torch.zeros(100, 100, dtype=torch.long)
    weight = torch.zeros(WORDS, 6, dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.full((100, 100, 6), 0.01, dtype=torch.bfloat16)
    output = mix_embeddings(ids, weight, torch.arange(100).roll(1), 0.25)
    (gradient,) = torch.autograd.grad(output, weight, grad_output)
    torch.testing.assert_close(gradient[0], torch.full((6,), 100.0, dtype=torch.bfloat16), rtol=8e-3, atol=0)
    assert (gradient[1:] == 0).all()


def test_gradcheck() -> None:
    for parts in PARTS:
        arguments = make_batch(parts, torch.float64, 3, 4, 2, 5)
        tables = tables_of(arguments)

        def output(*values: Tensor, arguments: dict[str, Any] = arguments) -> Tensor:
            given = dict(zip(tables_of(arguments), values, strict=True))
            norm = arguments.get("layer_norm")
            changed = {name: value for name, value in given.items() if not name.startswith("norm")}
            if norm is not None:
                clone = nn.LayerNorm(5, eps=norm.eps, dtype=torch.float64)
                del clone.weight, clone.bias
                clone.weight, clone.bias = given["norm weight"], given["norm bias"]
                changed["layer_norm"] = clone
            return mix_embeddings(**(arguments | changed))

        assert torch.autograd.gradcheck(output, tuple(tables.values()))


def test_only_what_requires_a_gradient_gets_one() -> None:
    arguments = make_batch({"place", "type", "norm"}, torch.float32)
    arguments["weight"].requires_grad_(False)
    arguments["layer_norm"].bias.requires_grad_(False)
    mix_embeddings(**arguments).square().sum().backward()
    assert arguments["weight"].grad is None and arguments["layer_norm"].bias.grad is None
    assert all(arguments[name].grad is not None for name in ("position_weight", "token_type_weight"))
    with torch.no_grad():
        assert not mix_embeddings(**arguments).requires_grad


def test_no_graph_break_under_torch_compile() -> None:
    for parts in (PARTS[0], PARTS[-1]):
        arguments = make_batch(parts, torch.float32)
        weight = arguments.pop("weight")
        torch.compiler.reset()

        def loss(weight: Tensor, arguments: dict[str, Any] = arguments) -> Tensor:
            return mix_embeddings(weight=weight, **arguments).square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(weight)
        torch.testing.assert_close(compiled, loss(weight))
        expected = torch.autograd.grad(loss(weight), weight)
        torch.testing.assert_close(torch.autograd.grad(compiled, weight), expected)


def test_results_do_not_depend_on_threads_or_on_what_new_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    arguments = make_batch(PARTS[-1], torch.float32, 40, 80, 30, 65)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(threads > 1)
            output = mix_embeddings(**arguments)
            results.append(outputs_and_gradients(arguments, output, output.detach()))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)
        assert all(value.isfinite().all() for value in result.values())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 5),
    times=st.integers(1, 3),
    length=st.integers(0, 4),
    width=st.integers(1, 40),
    parts=st.sampled_from(PARTS),
    seed=st.integers(0, 999),
)
def test_any_shape(rows: int, times: int, length: int, width: int, parts: set[str], seed: int) -> None:
    arguments = make_batch(parts, torch.float64, rows, rows * times, length, width, seed)
    output = mix_embeddings(**arguments)
    if length == 0:
        assert output.numel() == 0
        return
    torch.testing.assert_close(output, true_embeddings(arguments), rtol=1e-6, atol=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": torch.full((5, 7), 23)}, "input_ids holds 23; allowed: 0 to 22"),
    ({"input_ids": torch.full((5, 7), -1)}, "input_ids holds -1"),
    ({"partner": torch.full((5,), 5)}, "partner holds 5; allowed: 0 to 4"),
    ({"token_type_ids": torch.full((5, 7), 3)}, "token_type_ids holds 3; allowed: 0 to 2"),
    ({"position_ids": torch.full((5, 7), 40)}, "position_ids holds 40; allowed: 0 to 39"),
    ({"input_ids": torch.zeros(5, dtype=torch.long)}, r"input_ids has shape \(5,\); allowed: \[any, any\]"),
    ({"lam": torch.ones(4)}, r"lam has shape \(4,\); allowed: \[5\]"),
    ({"padding_mask": torch.ones(5, 6, dtype=torch.bool)}, r"padding_mask has shape \(5, 6\); allowed: \[5, 7\]"),
    ({"padding_mask": torch.ones(5, 7)}, "padding_mask is torch.float32; allowed: torch.bool"),
    ({"position_weight": torch.ones(40, 11)}, r"position_weight has shape \(40, 11\); allowed: \[any, 12\]"),
    ({"position_weight": torch.ones(40, 12).half()}, "position_weight is torch.float16; allowed: torch.float32"),
    ({"position_weight": torch.ones(6, 12)}, "input_ids has 7 positions; allowed: up to 6"),
    ({"position_weight": None, "position_ids": torch.zeros(5, 7).long()}, "position_weight, the table that it indexes"),
    ({"token_type_ids": None}, "token_type_ids and token_type_weight belong together"),
    ({"layer_norm": nn.LayerNorm(11)}, r"layer_norm.normalized_shape is \(11,\); allowed: \(12,\)"),
    ({"weight": torch.ones(23, 12).long()}, "weight is torch.int64; allowed: float32"),
    ({"num_rows": 6}, "num_rows is 6; allowed: 1 to 5"),
    ({"backend": "gpu"}, "backend is 'gpu'; allowed: auto, reference, cpu, triton, cuda"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_wrong_arguments_are_refused_with_field_value_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    arguments = make_batch({"place", "type", "norm"}, torch.float32)
    with pytest.raises(ValueError, match=message):
        mix_embeddings(**(arguments | change))


def test_opcheck(each_backend: str) -> None:
    if each_backend != "cpu":
        pytest.skip("the reference is plain PyTorch")
    for parts in PARTS:
        given = make_batch(parts, torch.float32)
        norm = given.pop("layer_norm", None)
        norms = (None, None, 1e-5, False) if norm is None else (norm.weight, norm.bias, norm.eps, True)
        names = MixInputs._fields[: MixInputs._fields.index("norm_weight")]
        arguments = (*(given.get(name) for name in names), *norms, given["num_rows"], given["include_clean"])
        # Two empty results have the same (no) memory, which the check of the schema takes for aliasing.
        utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        every = (*utils, "test_schema") if {"place", "type", "norm"} <= parts else utils
        torch.library.opcheck(torch.ops.mixkd_fast.mix_embeddings.default, arguments, test_utils=every)
        output, mean, rstd = torch.ops.mixkd_fast.mix_embeddings(*arguments)
        detached = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
        backward = (torch.ones_like(output), *detached, mean, rstd, 31, False)
        torch.library.opcheck(torch.ops.mixkd_fast.mix_embeddings_backward.default, backward, test_utils=every)
