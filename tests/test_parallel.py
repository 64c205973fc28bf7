"""Experts in slices over processes: ranks agree, slots change nothing, and nothing hangs."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sliced_worker import observe

from foreroute.data.adapters.weightless import ParameterShape
from foreroute.runtime.parallel import ExpertSlice, SlicedWriter, SliceRanks

WORKER = Path(__file__).parent / "sliced_worker.py"
LIMIT_S = 240
CASES = {
    "all": {"expert_slots": "100%", "dtype": "float32"},
    "quarter": {"expert_slots": "25%", "dtype": "float32"},
    "prefetch": {"expert_slots": "25%", "dtype": "float32", "prefetch": "all"},
}


def launch(size: int, out: Path, cases: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(size), str(WORKER), str(out), json.dumps(cases)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.fixture(scope="module", params=[2, 4])
def seen(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By case, what each rank saw; afterwards one dies, and all end within seconds."""
    out = tmp_path_factory.mktemp(f"ranks{request.param}")
    start = time.monotonic()
    done = launch(request.param, out, CASES | {"die": CASES["quarter"]})
    assert (out / "prefetch_0.pt").exists(), done.stderr
    assert done.returncode != 0  # the last case: one rank dies, which ends all
    assert not (out / "die_0.pt").exists()
    assert time.monotonic() - start < LIMIT_S
    return {
        name: [
            torch.load(out / f"{name}_{rank}.pt", weights_only=True)
            for rank in range(request.param)
        ]
        for name in CASES
    }


@pytest.mark.slow
def test_ranks_are_bit_equal_to_each_other(seen: dict[str, list[Any]]) -> None:
    for ranks in seen.values():
        for other in ranks[1:]:
            for name in ("logits", "greedy", "sampled", "counts"):
                assert torch.equal(other[name], ranks[0][name]), name


@pytest.mark.slow
def test_slots_and_prefetch_change_no_bit(seen: dict[str, list[Any]]) -> None:
    for name in ("quarter", "prefetch"):
        for what in ("logits", "greedy"):
            assert torch.equal(seen[name][0][what], seen["all"][0][what])
    assert seen["quarter"][0]["counts"][1] > 0


@pytest.mark.slow
def test_slices_are_near_one_process_and_hold_their_share(seen: dict[str, list[Any]]) -> None:
    alone, ranks = observe(CASES["quarter"]), seen["quarter"]
    # float32 sums in another order: 8 layers of 1e-7 relative steps
    assert torch.allclose(ranks[0]["logits"], alone["logits"], atol=1e-4)
    assert torch.equal(ranks[0]["greedy"], alone["greedy"])
    assert torch.equal(ranks[0]["bytes"] * len(ranks), alone["bytes"])


class Experts(torch.nn.Module):
    """Shapes of an experts module: 2 experts, hidden 4, intermediate 6."""

    def __init__(self, *, is_transposed: bool, is_concatenated: bool) -> None:
        super().__init__()
        self.is_transposed, self.is_concatenated = is_transposed, is_concatenated
        first, second = (2, 12, 4), (2, 4, 6)
        if is_transposed:
            first, second = (2, 4, 12), (2, 6, 4)
        for name, shape in (
            ("gate_up_proj", first),
            ("gate_up_proj_bias", (2, 12)),
            ("down_proj", second),
            ("down_proj_bias", (2, 4)),
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
        cuts = ExpertSlice(module, SliceRanks(rank, 3))
        local = Local(cuts.shapes())
        writer = SlicedWriter(local, cuts)
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
