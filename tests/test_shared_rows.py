"""Engines of one host on one copy of a prepared model's experts."""

from pathlib import Path

import pytest
import torch
from processes import run_ranks

from foreroute.estimators.ranks import joined_ranks
from foreroute.runtime import Engine
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.pack import pack_model

TOKENS = torch.arange(3, 40).unsqueeze(0)
SETTINGS = {"device": "cpu", "expert_slots": "25%"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "packed"
    pack_model(Checkpoint.open("bundled"), out, device="cpu")
    return out


def mapped_kib(folder: Path) -> dict[str, int]:
    """Resident and proportional size of this process' mappings of files of rows."""
    sizes, is_ours = {"Rss:": 0, "Pss:": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word, *rest = line.split()
        if "-" in word and not word.endswith(":"):
            is_ours = str(folder / "experts") in line
        elif is_ours and word in sizes:
            sizes[word] += int(rest[0])
    return sizes


def run_beside_another(folder: Path, out: Path) -> None:
    with (
        Engine.from_pretrained(str(folder), share_experts=True, **SETTINGS) as engine,
        joined_ranks() as ranks,
    ):
        ids = engine.generate(TOKENS, max_new_tokens=8, do_sample=False)
        engine.check_integrity()
        ranks.wait()  # the other has its mappings too
        sizes = mapped_kib(folder)
        ranks.wait()
        torch.save({"ids": ids, **sizes}, out / f"{ranks.rank}.pt")


def test_two_engines_have_one_copy_and_the_tokens_of_an_engine_alone(
    packed: Path, tmp_path: Path
) -> None:
    assert run_ranks(2, run_beside_another, packed, tmp_path) == [0, 0]
    seen = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    with Engine.from_pretrained(str(packed), **SETTINGS) as alone:
        ids = alone.generate(TOKENS, max_new_tokens=8, do_sample=False)
        num_kib = alone.offloaded.store.num_bytes / 1024
    for one in seen:
        assert torch.equal(one["ids"], ids)
        assert one["Rss:"] >= num_kib  # all of it was read, and checked
        assert one["Pss:"] < 0.52 * num_kib + 200  # half, and the ends of pages


def test_what_is_written_to_shared_rows_is_a_process_own(packed: Path) -> None:
    with Engine.from_pretrained(str(packed), share_experts=True, **SETTINGS) as engine:
        before = engine(TOKENS).logits
        engine.offloaded.store.rows[0].zero_()
        engine.offloaded.store.rows[1][:] = 0
    with Engine.from_pretrained(str(packed), share_experts=True, **SETTINGS) as engine:
        assert torch.equal(engine(TOKENS).logits, before)


def test_rows_lie_where_kernels_read_at_full_rate(packed: Path) -> None:
    files = sorted((packed / "experts").iterdir())
    assert len(files) == 8
    for path in files:
        with path.open("rb") as file:
            assert (8 + int.from_bytes(file.read(8), "little")) % 64 == 0


def test_what_cannot_be_shared_is_refused_in_one_line(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bundled is not: foreroute pack makes one"):
        Engine.from_pretrained("bundled", share_experts=True, device="cpu")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in packed.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(packed)).parent.mkdir(exist_ok=True)
            (copy / path.relative_to(packed)).write_bytes(path.read_bytes())
    damaged = copy / "experts" / "layer-003.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    for whole in (bytes(content), bytes(content[:50])):
        damaged.write_bytes(whole)
        with pytest.raises(ValueError, match=r"layer-003.safetensors is damaged"):
            Engine.from_pretrained(str(copy), share_experts=True, device="cpu")
