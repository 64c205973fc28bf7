"""Loads a model or a tokenizer by the name a user types: `bundled`, a local folder, or a Hub id."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch

BUNDLED = "bundled"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_model(name: str) -> str:
    """The folder or Hub id behind a model's name.

    Raises:
        FileNotFoundError: If it looks like a local path and there is none.
    """
    if name == BUNDLED:
        folder = Path(str(resources.files("foreroute.data"))) / "bundled_model"
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"The bundled model is missing from {folder}. Install again.")
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no model: it has no config.json.")
        return str(path)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"There is no model folder at {name}. Give `bundled`, a folder with a config.json, "
            "or a Hub id like Qwen/Qwen3-30B-A3B."
        )
    return name


def resolve_dtype(name: str | torch.dtype) -> torch.dtype | str:
    """`auto` (what the checkpoint asks for), `float32`, `bfloat16` or `float16`, or a torch dtype.

    Raises:
        ValueError: If the name is another; the message lists the known ones.
    """
    if name == "auto" or name in DTYPES.values():
        return name
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"Unknown dtype {name!r}; known: auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one, else the CPU), `cpu`, `cuda`, `cuda:1`.

    Raises:
        ValueError: If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {name!r}; give auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"Device {name} was asked for, but torch sees no CUDA device; use cpu.")
    return device


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a causal language model.

    Args:
        name: `bundled`, a local folder, or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run code that came with the checkpoint.

    Raises:
        ValueError: If it is missing, its architecture is unknown to this transformers, or
            transformers has no causal language model for it.
    """
    from transformers import AutoConfig  # lazily: transformers' auto classes import scikit-learn

    source = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(_unreadable(name, error)) from error
    require_causal_lm(config, name)
    return config


def require_causal_lm(config: Any, name: str) -> None:
    """Refuse a model that transformers does not build with AutoModelForCausalLM.

    Args:
        config: The model's.
        name: What the user calls it, for the message.

    Raises:
        ValueError: If it is for images, translation or another task.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    brings_own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if brings_own or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    raise ValueError(
        f"{name} ({config.model_type}) is not supported: transformers has no AutoModelForCausalLM "
        "for it (models that also take images or speech are often of another class)."
    )


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal language model in eval mode, with its default experts implementation.

    Args:
        name: `bundled`, a local folder, or a Hub id.
        dtype: As `resolve_dtype` takes it.
        device: Where the whole model goes.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run code that came with the checkpoint.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If the model cannot be read; one line says why.
    """
    weights_dtype = resolve_dtype(dtype)
    from transformers import AutoModelForCausalLM

    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            config=config,
            dtype=weights_dtype,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(_unreadable(name, error)) from error
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer that belongs to a model.

    Args:
        name: `bundled`, a local folder, or a Hub id.
        revision: Branch, tag or commit of a Hub id; the weights' own.
        trust_remote_code: Run code that came with the checkpoint.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If there is none, or it cannot be read; one line says why.
    """
    from transformers import AutoTokenizer

    source = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # damaged files end in exceptions of every kind
        raise ValueError(
            f"{name} has no tokenizer that can be read: {_first_line(error)}"
        ) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # What transformers makes for some models where there are no files: no text has any tokens.
        files = ", ".join(tokenizer.vocab_files_names.values())
        raise ValueError(f"{name} has no tokenizer: none of its files ({files}) is there.")
    return tokenizer


def _unreadable(name: str, error: Exception) -> str:
    offline = os.environ.get("HF_HUB_OFFLINE") not in (None, "", "0")
    hint = " (HF_HUB_OFFLINE is set: only local models can be read)" if offline else ""
    return f"Model {name} cannot be read{hint}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
