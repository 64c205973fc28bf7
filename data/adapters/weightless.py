"""Builds models whose experts have shapes but no weights, so that loading never touches them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from foreroute.data.adapters.adapted import open_experts
from foreroute.data.adapters.model_class import auto_class
from foreroute.data.adapters.seam import is_experts_module
from foreroute.estimators.artifacts import joined_lines

SHAPES_ATTRIBUTE = "_foreroute_shapes"
ADAPTER_ATTRIBUTE = "_foreroute_adapter"


class ParameterShape(NamedTuple):
    """What a parameter of an experts module is, or would be."""

    shape: tuple[int, ...]
    """[E, ...]."""
    dtype: torch.dtype


def parameter_shapes(experts: nn.Module) -> dict[str, ParameterShape]:
    """The parameters of an experts module by name, also when it was built without them."""
    remembered: dict[str, ParameterShape] = experts.__dict__.get(SHAPES_ATTRIBUTE, {})
    return remembered or {
        name: ParameterShape(tuple(parameter.shape), parameter.dtype)
        for name, parameter in experts.named_parameters(recurse=False)
    }


def experts_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of a model, in order, by dotted path; what can be opened is opened."""
    open_experts(model)
    return {path: m for path, m in model.named_modules() if is_experts_module(m)}


def outline(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """A model on the meta device: every shape, no number, no memory.

    Args:
        config: As transformers loads it; how its checkpoint is quantised plays no role.
        dtype: Of its parameters.
        trust_remote_code: Run code that came with the checkpoint.

    Raises:
        ValueError: If transformers cannot build a model from it.
    """
    model_class = auto_class(config)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        del config.quantization_config
    try:
        with torch.device("meta"):
            model = model_class.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # whatever a value that cannot be ends in
        place = f" of {config.name_or_path}" if config.name_or_path else ""
        raise ValueError(
            f"Transformers cannot build a {config.model_type} model from the config{place}: "
            f"{joined_lines(error)}."
        ) from error
    finally:
        if quantization is not None:
            config.quantization_config = quantization
    return model.eval()


def weightless(model_class: type[Any], tensors: Mapping[str, Any]) -> type[Any]:
    """The same class of models, whose experts are built without weights, remembering their shapes.

    Its `from_pretrained` then loads everything but the experts: transformers reads a tensor only if
    the model has a parameter for it. No class that others use is touched.

    Args:
        model_class: A class of transformers' models.
        tensors: What is read in place of the files that transformers finds: the checkpoint's
            tensors by name, each read when it is indexed.
    """

    class Weightless(model_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            for experts in experts_by_path(self).values():
                experts.__dict__[SHAPES_ATTRIBUTE] = parameter_shapes(experts)
                experts._parameters.clear()
                # or transformers would initialise what is not there
                experts.__dict__["_is_hf_initialized"] = True

        def load_adapter(self, *args: Any, **settings: Any) -> None:
            """An adapter beside the weights: it comes when the experts are there."""
            self.__dict__[ADAPTER_ATTRIBUTE] = lambda: self.load_adapter(*args, **settings)

        def initialize_weights(self) -> None:
            with contextlib.ExitStack() as undo:  # some blocks initialise their experts' weights
                for experts in experts_by_path(self).values():
                    undo.enter_context(parameters_on_meta(experts))
                super().initialize_weights()

        @staticmethod
        def _load_pretrained_model(
            model: Any,
            state_dict: Any,
            checkpoint_files: Any,
            load_config: Any,
            expected_keys: Any = None,
        ) -> Any:
            if expected_keys is None:  # not an adapter's
                state_dict, checkpoint_files = dict(tensors), None
            return model_class._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )

    for name in (
        "__name__",
        "__qualname__",
        "__module__",
        "__doc__",
    ):  # tables go by a class's name
        setattr(Weightless, name, getattr(model_class, name))
    return Weightless


@contextlib.contextmanager
def parameters_on_meta(experts: nn.Module) -> Iterator[None]:
    """While open, an experts module built without parameters has them, as shapes without memory."""
    try:
        for name, (shape, dtype) in parameter_shapes(experts).items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            parameter = nn.Parameter(empty, requires_grad=False)
            parameter.__dict__["_is_hf_initialized"] = True  # or transformers would fill it
            experts.register_parameter(name, parameter)
        yield
    finally:
        experts._parameters.clear()


def load_awaited_adapter(model: Any) -> None:
    """Load the adapter that lies beside a model's weights, now that its experts are there."""
    load = model.__dict__.pop(ADAPTER_ATTRIBUTE, None)
    if load is not None:
        load()
