"""The command `foreroute profile`, but for its flags."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from foreroute.estimators.artifacts import require_file_place
from foreroute.estimators.byte_sizes import format_binary_bytes
from foreroute.estimators.console import plain_console
from foreroute.runtime.planning.machine import MachineProfile, known_profiles, save_profile

if TYPE_CHECKING:
    from rich.table import Table


def run_profile(out: Path, device: str, name: str, overwrite: bool) -> None:
    """Measure, print and save; takes the command's flags.

    Raises:
        ValueError: If the file is there already, or there is no such device.
    """
    from foreroute.runtime.planning.machine_probe import measure_machine

    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already. Choose another --out, or pass --overwrite.")
    if name in known_profiles():
        raise ValueError(f"{name} is a built-in profile; choose another --name.")
    require_file_place(out)
    started = time.perf_counter()
    profile = measure_machine(device, name)
    save_profile(out, profile)
    console = plain_console()
    console.print(_table(profile))
    console.print(f"Measured in {time.perf_counter() - started:.0f} s.")
    console.print(str(out), soft_wrap=True)


def _table(profile: MachineProfile) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=profile.device, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    table.caption, table.caption_justify = f"{profile.source}; {profile.reference}", "left"
    table.add_column("what", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    for kind, rates in (("copy", profile.link), ("gather", profile.gather)):
        for size, rate in rates:
            table.add_row(f"{kind} of {format_binary_bytes(size)}", f"{rate:.1f} GB/s")
    table.add_row("compute of one layer", f"{profile.layer_ms:.3f} ms")
    for what, ms in (
        ("fixed part of a fetch", profile.fetch_ms),
        ("of a layer's compute, beside its own demand", profile.overlap_ms),
        ("from a demand to a prefetch's first byte", profile.begin_ms),
        ("from routing to a prefetch's first byte", profile.predict_ms),
        ("what looking ahead costs a layer", profile.ahead_ms),
    ):
        if ms:
            table.add_row(what, f"{ms * 1e3:.1f} us")
    if profile.prefetch_gbps:
        table.add_row("prefetches beside compute", f"{profile.prefetch_gbps:.1f} GB/s")
    for kernel, us in profile.kernel_us.items():
        table.add_row(kernel, f"{us:.1f} us")
    table.add_row("launch", f"{profile.launch_ms * 1e3:.1f} us")
    table.add_row("wait for the device", f"{profile.sync_ms * 1e3:.1f} us")
    table.add_row("host memory", f"{profile.host_gbps:.1f} GB/s")
    table.add_row("device memory", f"{profile.device_gbps:.1f} GB/s")
    return table
