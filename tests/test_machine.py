"""Machine profiles: read, checked, interpolated, measured."""

import json
from pathlib import Path

import pytest
import torch

from foreroute.estimators.artifacts import parse_json
from foreroute.runtime.planning.machine import (
    MachineProfile,
    find_profile,
    known_profiles,
    load_profile,
    save_profile,
)
from foreroute.runtime.planning.machine_probe import measure_machine


def made(**changed: object) -> MachineProfile:
    values = {
        "name": "m",
        "source": "measured by hand",
        "device": "d",
        "link": ((1000, 1.0), (1000000, 10.0)),
        "layer_ms": 0.1,
        "host_gbps": 50.0,
        "device_gbps": 1000.0,
        "expert_bytes": 1000000,
        "layer_bytes": 50000000,
    }
    return MachineProfile(**(values | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", known_profiles())
def test_built_in_profiles_load_and_say_where_they_come_from(name: str) -> None:
    profile = find_profile(name)
    assert profile.is_measured or profile.source.startswith("from data sheets")
    assert profile.source in profile.describe()
    assert profile.is_measured == name.startswith("h100")


def test_h100_copies_as_measured() -> None:
    profile = find_profile("h100-pcie5")
    assert profile.copy_ms(9437184) == pytest.approx(9437184 / 45e6)  # one expert, 45 GB/s
    assert profile.copy_ms(8 * 9437184) == pytest.approx(8 * 9437184 / 50e6)
    assert 48 * profile.layer_ms == pytest.approx(4.97, abs=0.01)
    assert profile.piece_bytes == 2**20


def test_times_are_interpolated_between_sizes() -> None:
    profile = made()
    assert profile.copy_ms(0) == 0
    assert profile.copy_ms(1000) == pytest.approx(0.001)
    assert profile.copy_ms(1000000) == pytest.approx(0.1)
    assert profile.copy_ms(500500) == pytest.approx(0.0505)
    assert profile.copy_ms(2000000) == pytest.approx(0.2)


def test_layer_time_splits_into_fixed_and_weights() -> None:
    profile = made()  # 50 MB at 1000 GB/s are 0.05 ms
    assert profile.layer_fixed_ms == pytest.approx(0.05)
    assert profile.layer_ms_for(100000000) == pytest.approx(0.15)


@pytest.mark.parametrize("changed", [{}, {"fetch_ms": 0.01, "kernel_us": {"plan": 1.5}}])
def test_a_profile_survives_its_file(tmp_path: Path, changed: dict[str, object]) -> None:
    save_profile(tmp_path / "p.json", made(**changed))
    assert find_profile(tmp_path / "p.json") == made(**changed)


def test_a_profile_without_the_newer_fields_is_read(tmp_path: Path) -> None:
    old = {k: v for k, v in made().to_dict().items() if k not in ("fetch_ms", "kernel_us")}
    (tmp_path / "p.json").write_text(json.dumps(old))
    assert find_profile(tmp_path / "p.json") == made()


@pytest.mark.parametrize(
    "changed",
    [{"layer_ms": 0.0}, {"sync_ms": -1.0}, {"link": ()}, {"link": ((5, 1.0), (5, 2.0))}],
)
def test_senseless_numbers_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="rofile m"):
        made(**changed)


def test_unknown_and_damaged_profiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="h100-pcie5"):
        find_profile("h1000")
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"format_version": 1, "name": "x"}))
    with pytest.raises(ValueError, match="damaged"):
        load_profile(path)
    path.write_text(json.dumps({"format_version": 9}))
    with pytest.raises(ValueError, match="format version 9"):
        load_profile(path)


def test_this_machine_can_be_measured() -> None:
    profile = measure_machine("cpu", "here")
    assert profile.is_measured
    assert "memory to memory" in profile.source
    assert profile.expert_bytes == 9437184
    assert parse_json(json.dumps(profile.to_dict()).encode(), MachineProfile, "it") == profile


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_can_be_measured() -> None:
    profile = measure_machine("cuda", "here")
    one = profile.expert_bytes
    assert [size / one for size, _ in profile.gather] == [0.25, 0.5, 1, 2, 4, 8]
    assert max(rate for _, rate in profile.gather + profile.link) < profile.device_gbps
    assert profile.layer_ms > profile.layer_bytes / profile.device_gbps / 1e6 / 2
    assert profile.launch_ms > 0
    assert profile.pin_s_per_gib > 0
    assert 0 < profile.fetch_ms < profile.copy_ms(one)
    assert 0 < profile.begin_ms < profile.predict_ms < profile.copy_ms(one)
    assert profile.ahead_ms < profile.layer_ms
    assert profile.best_gbps / 2 < profile.prefetch_gbps < 1.1 * profile.best_gbps
    assert parse_json(json.dumps(profile.to_dict()).encode(), MachineProfile, "it") == profile
