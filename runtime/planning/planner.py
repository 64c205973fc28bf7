"""Plans a run from a model's configuration: what fits, how many slots, what to expect."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from foreroute.runtime.planning.gpus import GpuGroup
from foreroute.runtime.planning.machine import MachineProfile
from foreroute.runtime.planning.model_size import ModelSize
from foreroute.runtime.policies.slots import (
    PREFILL_BYTES,
    PREFILL_GROUP,
    RESERVE_BYTES,
    auto_slots,
)

ONE_GPU = GpuGroup()
HOST_RESERVE_BYTES = 4 * 2**30
"""Host memory left for the system and the Python process."""
HIT_RATES = (
    (0.05, 0.379),
    (0.10, 0.598),
    (0.15, 0.701),
    (0.20, 0.787),
    (0.25, 0.839),
    (0.40, 0.935),
    (0.60, 0.968),
    (1.00, 1.0),
)
"""(share of experts resident, hit rate) of the default policy on the recorded route."""
PREFETCH_OF_STALL = 0.15
"""What prefetch takes off the stall: .15 to .31 was measured on an H100, recall .89, 10 to 60 %."""
PREFETCH_OF_COMPUTE = 0.8
"""And at most that share of compute, behind which it hides (.81 where most was missing)."""


@dataclass(frozen=True, kw_only=True)
class PlanChoice:
    """One way to hold the experts."""

    expert_dtype: str
    expert_bytes: int
    """One expert, or a GPU's slice of it."""
    host_bytes: int
    """All experts, in host memory."""
    device_bytes: int
    """Everything on the device (on each), slots included."""
    slots: int
    """Per layer; 0 if not even one token's experts fit."""
    fits_host: bool
    hit_rate: float
    tpot_ms: float
    """On demand."""
    prefetch_tpot_ms: float
    """With `prefetch="auto"` and a good bundle."""

    @property
    def fits(self) -> bool:
        """Whether both memories suffice."""
        return self.fits_host and self.slots > 0


def plan_choices(
    model: ModelSize,
    profile: MachineProfile,
    *,
    gpu_bytes: int,
    host_bytes: int,
    context: int,
    gpus: GpuGroup = ONE_GPU,
) -> list[PlanChoice]:
    """What fits for each way to hold the experts.

    Args:
        model: Its size, measured for as many GPUs.
        profile: The machine.
        gpu_bytes: Device memory to use, of each GPU.
        host_bytes: Host memory to use.
        context: Tokens of context, prompt and answer, batch 1.
        gpus: What shares the model.
    """
    choices = []
    fixed = (model.other_params + context * model.cache_values) * model.dtype_bytes
    for dtype, size in model.expert_bytes.items():
        if dtype != "auto" and size == model.expert_bytes["auto"]:
            continue  # it is what auto stands for
        total = size * model.num_layers * model.num_experts * model.num_gpus
        shape = {
            "expert_bytes": size,
            "num_layers": model.num_layers,
            "num_experts": model.num_experts,
            "top_k": model.top_k,
        }
        try:
            slots = auto_slots(gpu_bytes - fixed, **shape)
        except ValueError:
            slots = 0
        choices.append(
            PlanChoice(
                expert_dtype=dtype,
                expert_bytes=size,
                host_bytes=total,
                device_bytes=fixed + slots * model.num_layers * size,
                slots=slots,
                fits_host=total + HOST_RESERVE_BYTES <= host_bytes,
                **_expected(model, profile, size, slots, gpus),
            )
        )
    return choices


def _expected(
    model: ModelSize, profile: MachineProfile, expert_bytes: int, slots: int, gpus: GpuGroup
) -> dict[str, float]:
    """Hit rate and TPOT on demand and with `prefetch="auto"`."""
    hit_rate = hit_rate_at(slots / model.num_experts)
    layer_bytes = model.layer_params * model.dtype_bytes + model.top_k * expert_bytes
    output_head_ms = model.output_head_params * model.dtype_bytes / profile.device_gbps / 1e6
    layer_ms = profile.layer_ms_for(layer_bytes) + gpus.all_reduce_ms
    compute = model.num_layers * layer_ms + output_head_ms
    missed = model.top_k * (1 - hit_rate)
    copy_ms = profile.copy_ms(2 * expert_bytes) / 2 / gpus.link_share
    stall = model.num_layers * missed * copy_ms
    saved = min(PREFETCH_OF_STALL * stall, PREFETCH_OF_COMPUTE * compute)
    return {
        "hit_rate": hit_rate,
        "tpot_ms": compute + stall,
        "prefetch_tpot_ms": compute + stall - saved,
    }


def hit_rate_at(share: float) -> float:
    """Hit rate of the default policy with a share of the experts resident, as recorded."""
    shares = [known for known, _ in HIT_RATES]
    if share <= shares[0]:
        return HIT_RATES[0][1] * share / shares[0]
    if share >= shares[-1]:
        return HIT_RATES[-1][1]
    at = bisect_right(shares, share)
    (low, below), (high, above) = HIT_RATES[at - 1], HIT_RATES[at]
    return below + (share - low) / (high - low) * (above - below)


def assumptions(
    model: ModelSize, profile: MachineProfile, context: int, gpus: GpuGroup = ONE_GPU
) -> list[str]:
    """What the expected times rest on, one sentence each."""
    return [
        *gpus.notes,
        f"Machine: {profile.describe()}.",
        "Hit rates are those of the default policy on the recorded route of Qwen3-30B-A3B at the "
        "same share of experts resident; other models and texts differ.",
        f"A layer computes {profile.layer_fixed_ms:.3f} ms plus its weights at "
        f"{profile.device_gbps:g} GB/s: attention over a long context is not counted.",
        f"Batch 1, {context} tokens of context, every layer keeping all keys and values in "
        f"{model.dtype_bytes} bytes each.",
        f"Reserved: {RESERVE_BYTES / 2**30:g} GiB on the device and two buffers of at most "
        f"{PREFILL_GROUP} experts or {PREFILL_BYTES / 2**20:g} MiB for prompts, "
        f"{HOST_RESERVE_BYTES / 2**30:g} GiB on the host.",
        f"Prefetch takes {PREFETCH_OF_STALL:.0%} off the stall, but at most "
        f"{PREFETCH_OF_COMPUTE:.0%} of compute, as measured on an H100 with predictions of recall "
        ".89 (simulated; random weights, replayed routing): experts too large for that gain less.",
        "auto is what a GPU stores unless told otherwise: bfloat16 in 12 bits without loss (with "
        "room for exceptions), checkpoints in fewer bits as they are.",
        "fp8, int8 and int4 experts change the output; unpacking takes no time here.",
    ]


def command_line(model: ModelSize, choice: PlanChoice) -> str:
    """What to type."""
    revision = f"--revision {model.revision} " if model.revision else ""
    dtype = "" if choice.expert_dtype == "auto" else f"--expert-dtype {choice.expert_dtype} "
    several = f"torchrun --standalone --nproc-per-node {model.num_gpus} --no-python "
    return (several if model.num_gpus > 1 else "") + (
        f"foreroute generate --model {model.name} {revision}--expert-slots {choice.slots} "
        f"{dtype}"
        '--prompt "Hello" --max-new-tokens 64'
    )
