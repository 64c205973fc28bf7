"""Loads a model or a tokenizer by the name a user types: `bundled`, a local folder, or a Hub id."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from foreroute.data.adapters.config_file import (
    GREATEST_INTEGER,
    check_config_file,
    check_generation_file,
)
from foreroute.data.adapters.model_class import auto_class, writing_part
from foreroute.data.adapters.weight_files import find_weight_files
from foreroute.estimators.artifacts import first_line, interrupts_kept, joined_lines

BUNDLED = "bundled"
PREPARED_MANIFEST = "foreroute.json"
"""In a folder that `foreroute pack` wrote, whose experts only the runtime reads."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LOADING = threading.RLock()


class HubSettings(TypedDict, total=False):
    """How transformers' own `from_pretrained` is told where files come from."""

    revision: str | None
    """Branch, tag or commit of a Hub id; `main` unless said."""
    trust_remote_code: bool
    """Run code that came with the checkpoint; off unless said."""
    cache_dir: str | Path | None
    """Where downloads are kept."""
    token: str | bool | None
    """The Hub's, for models that need one."""
    local_files_only: bool
    """Download nothing."""
    subfolder: str
    """Folder of the repository that holds the model."""
    force_download: bool
    """Download also what is cached."""
    proxies: dict[str, str] | None
    """By protocol."""


@contextlib.contextmanager
def loading_alone() -> Iterator[None]:
    """While open, no other model is loaded here, and torch is as a fresh process has it.

    Transformers sets torch's default dtype while it builds a model, for all threads.
    """
    from transformers.utils import logging

    with _LOADING, interrupts_kept(), torch.inference_mode(False), _on_the_cpu():
        default, verbosity = torch.get_default_dtype(), logging.get_verbosity()
        had_bar = logging.is_progress_bar_enabled()
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(default)
            logging.set_verbosity(verbosity)
            if had_bar:
                logging.enable_progress_bar()


def _on_the_cpu() -> contextlib.AbstractContextManager[Any]:
    """Makes the CPU the default device where it is not: the context slows every call of torch."""
    is_there = torch.get_default_device().type == "cpu"
    return contextlib.nullcontext() if is_there else torch.device("cpu")


def resolve_model(name: str, subfolder: str = "") -> str:
    """The folder or Hub id behind a model's name.

    Args:
        name: `bundled`, a local folder or a Hub id.
        subfolder: Of the folder, that holds the model.

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
        if not (path / subfolder / "config.json").is_file():
            has_adapter = (path / subfolder / "adapter_config.json").is_file()
            what = ", but an adapter: load its base model, then" if has_adapter else ":"
            how = " PeftModel.from_pretrained(engine.model, folder)" if has_adapter else ""
            raise FileNotFoundError(
                f"{path / subfolder} holds no model{what}{how or ' it has no config.json'}."
            )
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


def resolve_device(name: str | torch.device) -> torch.device:
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
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Device {name} is not supported; give auto, cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"Device {name} was asked for, but torch sees no CUDA device; use cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        num = torch.cuda.device_count()
        raise ValueError(f"Device {name} was asked for, but torch sees only {num} CUDA devices.")
    return device


def load_config(name: str, **hub: Unpack[HubSettings]) -> Any:
    """The configuration of a model that writes text.

    Args:
        name: `bundled`, a local folder, or a Hub id.
        **hub: See `HubSettings`.

    Raises:
        ValueError: If it is missing, its architecture is unknown to this transformers, or
            transformers has no model of it that writes text.
    """
    from transformers import AutoConfig  # lazily: transformers' auto classes import scikit-learn
    from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

    source, settings = (
        resolve_model(name, hub.get("subfolder", "")),
        hub | {"revision": hub.get("revision") or "main"},
    )
    trusted = settings.pop("trust_remote_code", False)
    try:
        file = cached_file(source, CONFIG_NAME, **settings)
    except (OSError, ValueError) as error:
        raise ValueError(_unreadable(name, error)) from error
    check_config_file(Path(file))
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trusted, **settings)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(_unreadable(name, error)) from error
    except Exception as error:  # each model's config checks its fields in its own way
        raise ValueError(f"{file} cannot be used: {joined_lines(error)}") from error
    generation_file = Path(file).with_name(GENERATION_CONFIG_NAME)
    if generation_file.is_file():
        size = getattr(config.get_text_config(), "vocab_size", None)
        check_generation_file(generation_file, size or GREATEST_INTEGER)
    config = writing_part(config)
    auto_class(config, name)  # or it raises
    return config


def find_prepared(name: str, config: Any, **hub: Unpack[HubSettings]) -> Path | None:
    """The manifest that `foreroute pack` left beside a model's config; None where there is none.

    Args:
        name: `bundled`, a local folder, or a Hub id, whose manifest is downloaded.
        config: As `load_config` gave it; says which commit it is of.
        **hub: See `HubSettings`.

    Raises:
        ValueError: If the Hub cannot say whether there is one.
    """
    from transformers.utils import cached_file

    settings = hub | {"revision": hub.get("revision") or "main"}
    settings.pop("trust_remote_code", None)
    try:
        found = cached_file(
            resolve_model(name, hub.get("subfolder", "")),
            PREPARED_MANIFEST,
            _raise_exceptions_for_missing_entries=False,
            _commit_hash=getattr(config, "_commit_hash", None),
            **settings,
        )
    except OSError as error:
        raise ValueError(_unreadable(name, error)) from error
    return None if found is None else Path(found)


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
    device_map: str | None = None,
    **hub: Unpack[HubSettings],
) -> Any:
    """Load a model that writes text in eval mode, with its default experts implementation.

    Args:
        name: `bundled`, a local folder, or a Hub id.
        dtype: As `resolve_dtype` takes it.
        device: Where the whole model goes, unless a map says it.
        device_map: How its layers are spread over the host's GPUs (`auto`, `balanced`,
            `sequential`), by accelerate.
        **hub: See `HubSettings`.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If the model cannot be read, or the GPUs of a map cannot hold it; one line says
            why.
    """
    weights_dtype = resolve_dtype(dtype)
    source = resolve_model(name, hub.get("subfolder", ""))
    config = load_config(name, **hub)
    if find_prepared(name, config, **hub) is not None:
        raise ValueError(
            f"{name} is a prepared model, whose experts lie in the runtime's rows: it cannot be "
            f"loaded whole. Give the model it was made of ({PREPARED_MANIFEST} names it)."
        )
    settings = hub | {"revision": hub.get("revision") or "main"}
    with loading_alone():
        find_weight_files(source, config, **settings)  # says what is wrong with a file, in one line
        try:
            model = auto_class(config, name).from_pretrained(
                source,
                config=config,
                dtype=weights_dtype,
                use_safetensors=True,
                device_map=device_map,
                **settings,
            )
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(_unreadable(name, error)) from error
    model.eval().requires_grad_(False)
    if device_map is None:
        return model.to(device)
    _require_no_offload(model, name)
    return model


def _require_no_offload(model: Any, name: str) -> None:
    """Refuse a map that leaves part of a model to the host: accelerate copies that at every pass.

    Raises:
        ValueError: If it does; names the first such part.
    """
    places = getattr(model, "hf_device_map", None) or {}
    on_host = [part for part, place in places.items() if str(place) in ("cpu", "disk", "meta")]
    if on_host and len(on_host) < len(places):
        raise ValueError(
            f"The GPUs cannot hold {name}: {on_host[0]} and more would stay on the host. Give "
            "--expert-slots instead, which keeps the experts there and fetches what is needed."
        )


def load_tokenizer(name: str, **hub: Unpack[HubSettings]) -> Any:
    """The tokenizer that belongs to a model.

    Args:
        name: `bundled`, a local folder, or a Hub id.
        **hub: See `HubSettings`.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If there is none, or it cannot be read; one line says why.
    """
    from transformers import AutoTokenizer

    source = resolve_model(name, hub.get("subfolder", ""))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, **(hub | {"revision": hub.get("revision") or "main"})
        )
    except Exception as error:  # damaged files end in exceptions of every kind
        raise ValueError(
            f"{name} has no tokenizer that can be read: {first_line(error)}"
        ) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # What transformers makes for some models where there are no files: no text has any tokens.
        files = ", ".join(tokenizer.vocab_files_names.values())
        raise ValueError(f"{name} has no tokenizer: none of its files ({files}) is there.")
    return tokenizer


def _unreadable(name: str, error: Exception) -> str:
    offline = os.environ.get("HF_HUB_OFFLINE") not in (None, "", "0")
    hint = " (HF_HUB_OFFLINE is set: only local and cached models can be read)" if offline else ""
    return f"Model {name} cannot be read{hint}: {first_line(error)}"
