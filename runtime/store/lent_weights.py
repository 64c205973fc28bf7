"""Lends a model the weights that lie in the host store, so that it is whole for all who look.

Saving, counting, merging an adapter and loading other weights then work as on any model; the
experts are still computed from slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foreroute.data.adapters.adapted import checkpoint_name
from foreroute.data.adapters.weightless import parameter_shapes
from foreroute.runtime.store.host_store import ParameterSpec, RowLayout


class LentWeights:
    """The parameters of one experts module: views of its host rows.

    What is stored in fewer bits has no view: such a parameter has a shape and no numbers (it is on
    the meta device), and is decoded when the module's state is asked for.
    """

    def __init__(self, experts: nn.Module, layout: RowLayout, rows: Tensor) -> None:
        """Give the module its parameters.

        Args:
            experts: A module without parameters of its own.
            layout: How an expert lies in a row.
            rows: [E, row_bytes] uint8.
        """
        self._layout, self._rows = layout, rows
        self._views = {
            name: _apart(rows, spec)
            for name, spec in layout.parameters.items()
            if name not in layout.encoded
        }
        self._experts = experts
        for name, (shape, dtype) in parameter_shapes(experts).items():
            stands_in = torch.empty(shape, dtype=dtype, device="meta")
            lent = nn.Parameter(self._views.get(name, stands_in), requires_grad=False)
            experts.register_parameter(name, lent)
        experts.__dict__["_apply"] = lambda *_, **__: experts  # they stay where and as they are
        self.is_shown_decoded = True
        """Whether the module's state has numbers where weights are stored in fewer bits."""
        if layout.encoded:
            experts.register_state_dict_post_hook(lambda *state: self._decode(*state))

    def _decode(self, _: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        if self.is_shown_decoded:
            weights = self._layout.weights(self._rows)
            for name in self._layout.encoded:
                state[prefix + checkpoint_name(self._experts, name)] = weights[name][:]

    def take_in(self) -> None:
        """Write parameters that now lie elsewhere (a merge made new ones) into the rows.

        Raises:
            ValueError: If they are stored in fewer bits.
        """
        for name in parameter_shapes(self._experts):
            parameter, view = self._experts._parameters.get(name), self._views.get(name)
            if parameter is None or parameter.is_meta:
                continue
            if view is None:
                raise ValueError(
                    "Experts that are stored in fewer bits cannot be changed: merge the adapter "
                    "into the checkpoint first."
                )
            if parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter.detach())
                parameter.data = view


def _apart(rows: Tensor, spec: ParameterSpec) -> Tensor:
    """One parameter of all experts, [E, ...]: the rows' memory under a storage of its own.

    Whoever saves a model takes tensors of one storage for copies of each other.
    """
    part = rows[:, spec.offset_bytes : spec.offset_bytes + spec.num_bytes]
    apart: Tensor = torch.from_numpy(part.numpy())
    whole: Tensor = apart.view(spec.dtype).unflatten(1, spec.shape)
    return whole
