"""Experts cut for several processes: what the slices hold, as a checkpoint has it or encoded."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from low_bit import save_fp8, save_mxfp4
from tiny_models import tiny_model

from foreroute.data.adapters.weightless import ParameterShape
from foreroute.runtime.parallel import ExpertSlice, SlicedWriter, SliceRanks
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.encodings import encoder_named
from foreroute.runtime.store.offload import OffloadedModel, load_offloaded
from foreroute.runtime.store.pack import pack_model


class Experts(torch.nn.Module):
    """Shapes of an experts module: 2 experts, 6 intermediate dimensions and 4 hidden ones."""

    def __init__(
        self, *, is_transposed: bool, is_concatenated: bool, width: int = 6, hidden: int = 4
    ) -> None:
        super().__init__()
        self.is_transposed, self.is_concatenated = is_transposed, is_concatenated
        first, second = (2, 2 * width, hidden), (2, hidden, width)
        if is_transposed:
            first, second = (2, hidden, 2 * width), (2, width, hidden)
        for name, shape in (
            ("gate_up_proj", first),
            ("gate_up_proj_bias", (2, 2 * width)),
            ("down_proj", second),
            ("down_proj_bias", (2, hidden)),
        ):
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))


class Local:
    """A writer into tensors of the local shapes."""

    def __init__(self, shapes: dict[str, ParameterShape]) -> None:
        self.tensors = {name: torch.full(shape, torch.nan) for name, (shape, _) in shapes.items()}

    def put(self, name: str, expert_id: int, row: int, part: torch.Tensor) -> None:
        self.tensors[name][expert_id][row : row + len(part)] = part


def output_of(module: Experts, weights: dict[str, torch.Tensor], hidden: torch.Tensor) -> Any:
    """The plain computation of expert 1, with any number of intermediate dimensions."""
    first, second = weights["gate_up_proj"][1], weights["down_proj"][1]
    if module.is_transposed:
        first, second = first.T, second.T
    both = first @ hidden + weights["gate_up_proj_bias"][1]
    gate, up = both.chunk(2) if module.is_concatenated else (both[0::2], both[1::2])
    return second @ (torch.sigmoid(gate) * up) + weights["down_proj_bias"][1]


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_concatenated", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_slices_add_up_to_the_whole_expert(
    is_transposed: bool, is_concatenated: bool, chunk: int
) -> None:
    torch.manual_seed(0)
    module = Experts(is_transposed=is_transposed, is_concatenated=is_concatenated).double()
    whole = {name: value.detach() for name, value in module.named_parameters()}
    hidden = torch.randn(4).double()
    total = torch.zeros(4).double()
    for rank in range(3):
        part = ExpertSlice(module, SliceRanks(rank, 3))
        local = Local(part.shapes())
        writer = SlicedWriter(local, part.parameters)
        for name, value in whole.items():
            for expert_id, weight in enumerate(value):
                for row in range(0, len(weight), chunk):  # as a checkpoint's tensors may come
                    writer.put(name, expert_id, row, weight[row : row + chunk])
        held = {name: tensor.double() for name, tensor in local.tensors.items()}
        assert not any(tensor.isnan().any() for tensor in held.values())
        total += output_of(module, held, hidden)
    # the writer's tensors are float32
    assert torch.allclose(total, output_of(module, whole, hidden), atol=1e-5)


def test_sizes_that_do_not_divide_are_refused_with_those_that_do() -> None:
    module = Experts(is_transposed=False, is_concatenated=True)
    with pytest.raises(ValueError, match=r"4 processes do not divide the experts' 6 .* 2, 3, 6"):
        ExpertSlice(module, SliceRanks(0, 4))


SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}


def halves(folder: Path) -> list[OffloadedModel]:
    """What each of two processes loads."""
    return [load_offloaded(str(folder), device="cpu", ranks=SliceRanks(rank, 2)) for rank in (0, 1)]


def require_halves_of(whole: OffloadedModel, parts: list[OffloadedModel]) -> None:
    """The decoded numbers of both halves are the decoded numbers of the whole, cut."""
    for number, layer in enumerate(whole.moe.layers):
        weights = whole.store.layouts[number].weights(whole.store.rows[number])
        for rank, part in enumerate(parts):
            cuts = ExpertSlice(layer.experts, SliceRanks(rank, 2))
            held = part.store.layouts[number].weights(part.store.rows[number])
            for name, weight in weights.items():
                for expert_id, matrix in enumerate(weight[:]):
                    ((_, expected),) = _joined(cuts.parameters.take(name, 0, matrix))
                    assert torch.equal(held[name][expert_id : expert_id + 1][0], expected), name


def _joined(pieces: Any) -> list[tuple[int, torch.Tensor]]:
    pieces = list(pieces)
    return [(0, torch.cat([rows for _, rows in pieces]))]


@pytest.mark.parametrize("form", ["mxfp4", "fp8"])
def test_checkpoints_in_few_bits_are_cut_as_they_are(tmp_path: Path, form: str) -> None:
    if form == "mxfp4":
        save_mxfp4(tmp_path, hidden_size=64, intermediate_size=64)
    else:
        save_fp8(tmp_path, "qwen3_moe", **SIZES)
    whole, parts = load_offloaded(str(tmp_path), device="cpu"), halves(tmp_path)
    assert all(layout.is_native for part in parts for layout in part.store.layouts)
    require_halves_of(whole, parts)
    with pytest.raises(ValueError, match=r"4 processes .* 64 .*, as they are stored; these do: 2"):
        load_offloaded(str(tmp_path), device="cpu", ranks=SliceRanks(0, 4))


@pytest.mark.parametrize("expert_dtype", ["auto", "lossless", "bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_prepared_models_are_cut_without_rounding_again(
    tmp_path: Path, expert_dtype: str, model_type: str
) -> None:
    sizes = dict.fromkeys(SIZES, 128)  # of which int4 has groups of 128, and its halves of 64
    tiny_model(model_type, dtype=torch.bfloat16, **sizes).save_pretrained(tmp_path / "source")
    checkpoint = Checkpoint.open(str(tmp_path / "source"), expert_dtype=expert_dtype)
    pack_model(checkpoint, tmp_path / "packed", device="cpu")
    if expert_dtype == "int4":
        with pytest.raises(ValueError, match=r"2 processes .* as they are stored; these do: none"):
            halves(tmp_path / "packed")
        return
    whole = load_offloaded(str(tmp_path / "packed"), device="cpu")
    require_halves_of(whole, halves(tmp_path / "packed"))


def test_int4_is_cut_along_its_groups() -> None:
    """Slices of 64 of 128 inputs would have groups of another size; 128 of 256 have not."""
    module = Experts(is_transposed=False, is_concatenated=True, width=256, hidden=64)
    part = ExpertSlice(module, SliceRanks(1, 2), encoder_named("int4"), is_stored=True)
    codes = torch.arange(64 * 128).view(64, 128)
    assert [rows[0, 0].item() for _, rows in part.stored.take("down_proj", 0, codes)] == [64]
    steps = torch.arange(64 * 2).view(64, 2, 1)
    assert [rows[1].item() for _, rows in part.stored.take("down_proj_steps", 0, steps)] == [3]


def test_experts_that_are_encoded_while_they_are_read_have_groups_of_their_slices(
    tmp_path: Path,
) -> None:
    tiny_model("qwen3_moe", dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path)
    load = functools.partial(load_offloaded, str(tmp_path), device="cpu", expert_dtype="int4")
    part = load(ranks=SliceRanks(1, 2))
    assert part.store.num_bytes < 0.6 * load().store.num_bytes
    with pytest.raises(ValueError, match=r"8 processes .* as they are stored; these do: 2, 4"):
        load(ranks=SliceRanks(0, 8))
