"""How much memory the host still has, asked before anything large is allocated."""

from __future__ import annotations

from pathlib import Path

GIB = 2**30
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_host_bytes() -> int | None:
    """Memory that can be allocated without swapping, also under a container's limit.

    Returns:
        Bytes; None where the system does not say.
    """
    amounts = [amount for amount in (_from_meminfo(), _from_cgroup()) if amount is not None]
    return min(amounts, default=None)


FEWER_BITS = "Store the experts in fewer bits (--expert-dtype int8 or int4), or free memory."


def require_host_memory(
    expert_bytes: int, other_bytes: int, *, model_name: str, remedy: str = FEWER_BITS
) -> None:
    """Refuse a model that the host cannot hold.

    Args:
        expert_bytes: All experts, as they will be stored.
        other_bytes: Everything else that is loaded on the host, if only on its way to a device.
        model_name: For the message.
        remedy: What the user can do, one sentence.

    Raises:
        ValueError: If less is available; gives the numbers.
    """
    available = available_host_bytes()
    if available is None or expert_bytes + other_bytes <= available:
        return
    raise ValueError(
        f"{model_name} needs {expert_bytes / GIB:.1f} GiB of host memory for its experts and "
        f"{other_bytes / GIB:.1f} GiB for the rest; {available / GIB:.1f} GiB are available. "
        f"{remedy}"
    )


def _from_meminfo() -> int | None:
    if not MEMINFO.is_file():
        return None
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _from_cgroup() -> int | None:
    """What a container may still use, page cache that can be dropped included."""
    limit, used, details = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.is_file() or not used.is_file() or limit.read_text().strip() == "max":
        return None
    droppable = 0
    if details.is_file():
        for line in details.read_text().splitlines():
            if line.startswith("inactive_file "):
                droppable = int(line.split()[1])
    return int(limit.read_text()) - int(used.read_text()) + droppable
