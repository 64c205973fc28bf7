"""Makes saving, copying and moving a model mean the model with its experts, wherever they lie."""

from __future__ import annotations

import copy
import filecmp
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.runtime.store.lent_weights import LentWeights

SHARD_SIZE = "5GB"
"""What is copied at once while saving."""
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
HEADS = ("model.safetensors", "model.safetensors.index.json")
"""One of them makes a folder's weights be read: transformers looks for the first, then the other,
which names the shards."""
CONFIG_NAME = "config.json"


class WholeModel:
    """Stands before those methods of a model that would leave its experts out."""

    def __init__(
        self,
        model: Any,
        lent: Sequence[LentWeights],
        device: torch.device,
        *,
        is_sliced: bool = False,
    ) -> None:
        """Take the methods' places.

        Args:
            model: Transformers causal LM, on the device.
            lent: The weights of its experts.
            device: Where everything else is.
            is_sliced: Whether this process holds a slice of each expert alone.
        """
        self._is_sliced = is_sliced
        self._model, self._lent, self._device = model, lent, device
        self._save, self._load_adapter = model.save_pretrained, model.load_adapter
        model.save_pretrained = self.save_pretrained
        model.load_adapter = self.load_adapter
        model.__deepcopy__ = self.deepcopy
        model._apply = self.apply

    def save_pretrained(self, save_directory: str | Path, *args: Any, **settings: Any) -> None:
        """Save the model as `save_pretrained` does, with its experts, in full precision.

        The folder may be the model's own: files are written under other names first, see
        `move_checkpoint`.
        """
        self._require_whole()
        if getattr(self._model, "_hf_peft_config_loaded", False):  # only the adapter is saved
            self._save(save_directory, *args, **settings)
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"max_shard_size": SHARD_SIZE, "repo_id": folder.name} | settings
        if not settings.get("push_to_hub"):
            del settings["repo_id"]
        fresh = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
        try:
            self._save(fresh, *args, **settings)
        except BaseException:
            shutil.rmtree(fresh)
            raise
        move_checkpoint(fresh, folder)

    def load_adapter(self, *args: Any, **settings: Any) -> Any:
        """Load an adapter as `load_adapter` does; it looks at shapes only."""
        self._require_whole()
        for weights in self._lent:
            weights.is_shown_decoded = False
        try:
            return self._load_adapter(*args, **settings)
        finally:
            for weights in self._lent:
                weights.is_shown_decoded = True

    def deepcopy(self, _: dict[int, Any]) -> Any:
        """An ordinary model of its own, experts and all, that no engine runs.

        Raises:
            ValueError: If there are adapters in the model.
        """
        self._require_whole()
        model = self._model
        if any("merged_adapters" in module.__dict__ for module in model.modules()):
            raise ValueError("A model with adapters cannot be copied: merge or unload them first.")
        whole = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict={name: tensor.clone() for name, tensor in model.state_dict().items()},
            dtype=model.dtype,
        )
        whole.generation_config = copy.deepcopy(model.generation_config)
        whole.set_experts_implementation("batched_mm")  # what an engine is exact to
        return whole.train(model.training).to(self._device)

    def _require_whole(self) -> None:
        if self._is_sliced:
            raise ValueError(
                "This process holds a slice of each expert alone: save, copy or adapt the model in "
                "one process, without torchrun."
            )

    def apply(self, change: Callable[[Tensor], Tensor], *args: Any, **settings: Any) -> Any:
        """Move or cast the model where that leaves it where and as it is.

        Raises:
            ValueError: If it does not: its experts could not follow.
        """
        before = torch.empty(0, dtype=self._model.dtype, device=self._device)
        after = change(before)
        if after.dtype != before.dtype:
            raise ValueError(
                f"The experts of this model lie in host memory in {before.dtype}; to run it in "
                f"{after.dtype}, load it so: Engine.from_pretrained(..., dtype=...)."
            )
        if after.device != before.device:
            raise ValueError(
                f"This model runs on {before.device}; to run it on {after.device}, load it there: "
                "Engine.from_pretrained(..., device=...)."
            )
        return type(self._model)._apply(self._model, change, *args, **settings)


def move_checkpoint(fresh: Path, folder: Path) -> None:
    """Move a whole checkpoint to where another may lie, whose weights go.

    Killed at any point, the folder holds the old checkpoint, the new one, or (only where shards of
    the same names, or the config, must change under what names them) one that does not load while
    all of the new one is in the two folders; never a mixture of both.

    Args:
        fresh: A folder in `folder`, with the new checkpoint alone; removed.
        folder: What has a new file's name here is replaced.
    """
    new = sorted((path.name for path in fresh.iterdir()), key=lambda name: name in HEADS)
    has_weights = any(name in HEADS for name in new)
    if has_weights and any(_changes(fresh / name, folder / name) for name in new):
        for name in HEADS:
            (folder / name).unlink(missing_ok=True)
    for name in new:
        (fresh / name).replace(folder / name)
    fresh.rmdir()
    for old in folder.iterdir():
        if has_weights and WEIGHTS.fullmatch(old.name) and old.name not in new:
            old.unlink()


def _changes(new: Path, old: Path) -> bool:
    """Whether a file changes what the old checkpoint's head is about."""
    is_part = new.name == CONFIG_NAME or (WEIGHTS.fullmatch(new.name) and new.name not in HEADS)
    if not is_part or not old.exists():
        return False
    return new.name != CONFIG_NAME or not filecmp.cmp(new, old, shallow=False)
