"""Opens experts to transformers' experts interface that transformers itself leaves out of it.

Only modules of the model at hand are changed, to classes that do the same as before while their
implementation is `eager`, which is what transformers gives such models.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import use_experts_implementation

from foreroute.data.adapters.seam import is_experts_module

NAMES_ATTRIBUTE = "_foreroute_names"
CHOICE = ("hidden_states", "top_k_index", "top_k_weights")


def open_experts(model: nn.Module) -> None:
    """Open what can be opened, by structure; a model that needs nothing stays as it is.

    * Experts that are called with the router's choice and hold stacked matrices (step3p7).
    * Experts that choose by the router's logits themselves (aria).
    * Experts that are called with every token for every expert, weighed before (llama4), where the
      router chooses one.

    Args:
        model: Changed in place; again does nothing.
    """
    for block in [module for module in model.modules() if hasattr(module, "experts")]:
        experts: Any = block.experts
        if not isinstance(experts, nn.Module) or is_experts_module(experts):
            continue
        kind: Any = type(experts)
        asked = tuple(inspect.signature(experts.forward).parameters)
        if asked == ("hidden_states", "router_logits") and _hold_themselves(experts):
            _take(model, experts, _routing_within(kind), is_transposed=True)
        elif asked == CHOICE and _is_stacked(experts):
            _take(model, experts, _opened(kind), is_transposed=False)
        elif asked == CHOICE[:1] and _is_stacked(experts) and getattr(block, "top_k", 0) == 1:
            _take(model, experts, _opened(kind), is_transposed=True)
            own: Any = type(block)
            block.__class__ = _weighing_before(own)


def checkpoint_name(experts: nn.Module, name: str) -> str:
    """What a checkpoint calls a parameter of an experts module, from the module on."""
    names: dict[str, str] = experts.__dict__.get(NAMES_ATTRIBUTE, {})
    return names.get(name, name)


def _is_stacked(experts: Any) -> bool:
    """Whether a module holds its experts' two matrices, [E, ...] each, and nothing else."""
    own = dict(experts.named_parameters(recurse=False))
    return set(own) == {"gate_up_proj", "down_proj"} and all(
        p.dim() == 3 and len(p) == getattr(experts, "num_experts", 0) for p in own.values()
    )


def _hold_themselves(experts: Any) -> bool:
    """Let experts whose two matrices lie in modules of their own (`fc1`, `fc2`) hold them instead.

    The modules stay where the experts' own forward finds them, but are no part of the model.
    """
    own = dict(experts.named_parameters())
    if set(own) != {"fc1.weight", "fc2.weight"} or any(p.dim() != 3 for p in own.values()):
        return False
    for name, part in {"gate_up_proj": "fc1", "down_proj": "fc2"}.items():
        module = getattr(experts, part)
        delattr(experts, part)
        experts.__dict__[part] = module
        experts.register_parameter(name, module.weight)
    experts.__dict__[NAMES_ATTRIBUTE] = {"gate_up_proj": "fc1.weight", "down_proj": "fc2.weight"}
    experts.num_experts, experts.act_fn = len(own["fc1.weight"]), nn.SiLU()
    experts.register_state_dict_post_hook(_name_as_before)
    return True


def _name_as_before(experts: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Let a model's state, and so what is saved of it, have the names of its checkpoint."""
    for name, saved in experts.__dict__[NAMES_ATTRIBUTE].items():
        if prefix + name in state:
            state[prefix + saved] = state.pop(prefix + name)


def _take(model: nn.Module, experts: Any, kind: type[nn.Module], *, is_transposed: bool) -> None:
    """Give an experts module the marks of the interface, and the config that selects a function."""
    experts.__class__ = kind
    experts.has_gate, experts.has_bias, experts.is_concatenated = True, False, True
    experts.is_transposed = is_transposed
    holders = [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and any(m is experts for m in part.modules())
    ]
    experts.config = holders[-1].config  # the innermost
    for holder in holders:
        # transformers reads the source file for whether a class can be told which function to use
        type(holder)._can_set_experts_implementation_cached_value = True


@cache
def _opened(kind: type[Any]) -> type[nn.Module]:
    own = type(kind.__name__, (kind,), {"forward": kind.forward, "__module__": kind.__module__})
    opened: type[nn.Module] = use_experts_implementation(own)
    return opened


@cache
def _routing_within(kind: type[Any]) -> type[nn.Module]:
    """Experts that choose by the router's logits themselves; see `AriaExperts`."""

    class Chosen(kind):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
            raise NotImplementedError("These experts choose by the router's logits.")

    opened: Any = use_experts_implementation(Chosen)

    class RoutingWithin(opened):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
            output: Tensor
            if self.config._experts_implementation == "eager":
                output = kind.forward(self, hidden_states, router_logits)
            else:
                output = super().forward(
                    hidden_states, *self.route_tokens_to_experts(router_logits)
                )
            return output

        forward.__wrapped__ = kind.forward  # type: ignore[attr-defined]

    RoutingWithin.__name__, RoutingWithin.__module__ = kind.__name__, kind.__module__
    return RoutingWithin


@cache
def _weighing_before(kind: type[Any]) -> type[Any]:
    """A block whose chosen expert reads the token times its score; see `Llama4TextMoe`."""

    class WeighingBefore(kind):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            if self.experts.config._experts_implementation == "eager":
                result: tuple[Tensor, Tensor] = super().forward(hidden_states)
                return result
            hidden = hidden_states.reshape(-1, self.hidden_dim)
            scores, router_logits = self.router(hidden)  # 0 for every expert but the chosen one
            weights, ids = scores.max(dim=-1, keepdim=True)
            output = self.experts(hidden * weights, ids, weights.new_ones(weights.shape))
            return self.shared_expert(hidden) + output, router_logits

    WeighingBefore.__name__, WeighingBefore.__module__ = kind.__name__, kind.__module__
    return WeighingBefore
