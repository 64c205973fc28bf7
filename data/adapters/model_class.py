"""Which of transformers' auto classes builds a model: for text, or for images and text."""

from __future__ import annotations

from typing import Any

TEXT = "AutoModelForCausalLM"
IMAGES_AND_TEXT = "AutoModelForImageTextToText"


def auto_class(config: Any, name: str = "") -> Any:
    """The auto class of transformers that builds the whole model a config describes.

    A model that also takes images is built with what reads them, though it is used for text.

    Args:
        config: The model's.
        name: What the user calls it, for the message.

    Raises:
        ValueError: If it is for translation or another task, or writes in another way; one line.
    """
    import transformers  # lazily: its auto classes import scikit-learn

    found = _find(config)
    if found is None:
        raise ValueError(
            f"{name or 'This model'} ({config.model_type}) is not supported: transformers has "
            f"neither {TEXT} nor {IMAGES_AND_TEXT} for it."
        )
    auto, own_class = found
    if own_class is not None and not issubclass(own_class, transformers.GenerationMixin):
        raise ValueError(
            f"{name or 'This model'} ({config.model_type}) is not supported: it does not write one "
            "token after another."
        )
    return auto


def writing_part(config: Any) -> Any:
    """The config of the part that reads prompts and writes text, where a whole also speaks.

    Args:
        config: Of the whole.

    Returns:
        `config` if some auto class builds the whole; else that of its part (the thinker of
        qwen3_omni_moe) whose model says that a whole holds it under that name, which is how its
        tensors are found in the whole's checkpoint; without one, `config`.
    """
    if _find(config) is not None:
        return config
    for key in config.sub_configs:
        part = getattr(config, key)
        found = _find(part) if part is not None else None
        if found is not None and f"{getattr(found[1], 'base_model_prefix', None)}_config" == key:
            return part
    return config


def _find(config: Any) -> tuple[Any, Any] | None:
    """The auto class for a config, and the model class behind it if that is transformers' own."""
    import transformers

    known = {
        IMAGES_AND_TEXT: transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        TEXT: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    own = getattr(config, "auto_map", None) or {}
    for auto, mapping in known.items():
        if auto in own or type(config) in mapping:
            return getattr(transformers, auto), mapping.get(type(config), None)
    return None
