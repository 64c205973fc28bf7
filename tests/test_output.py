"""Output folders have one writer, are whole or the ones before, and nothing else is removed."""

import json
import os
import socket
import threading
from pathlib import Path

import pytest
import torch
from processes import run_killed, run_ranks
from toys import random_anchors, random_batch, toy_manifest

from foreroute.data.manifest import read_manifest
from foreroute.data.trace_writer import TraceWriter, remove_unlisted
from foreroute.data.traces import Traces
from foreroute.estimators.artifacts import new_file, write_json, write_tensors
from foreroute.estimators.output import claim, kind_of, new_folder, require_free, write_command

MOST_OPERATIONS = 200


def write_bundle(out: Path, version: int, overwrite: bool = False) -> None:
    """A folder of two files that belong together."""
    with new_folder(out, "bundle", overwrite=overwrite) as partial:
        write_tensors(partial / "estimators.safetensors", {"x": torch.full((4,), version)})
        write_json(partial / "manifest.json", {"version": version})


def version_of(out: Path) -> int:
    from foreroute.estimators.artifacts import read_tensors

    version = json.loads((out / "manifest.json").read_text())["version"]
    assert read_tensors(out / "estimators.safetensors")["x"].tolist() == [version] * 4
    return version


def left_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path != out)


def kills(function, *arguments, step=1):
    """Kill a function at each of its changes in turn; yields after each kill."""
    for operation in range(0, MOST_OPERATIONS, step):
        if run_killed(function, *arguments, at_operation=operation) == 0:
            assert operation > 5
            return
        yield operation
    raise AssertionError("It never came to its end.")


def test_a_kill_at_any_change_leaves_the_old_folder_or_the_new_one(tmp_path):
    out = tmp_path / "out"
    write_bundle(out, 0)
    for operation in kills(write_bundle, out, 1, True):
        assert version_of(out) in (0, 1), operation
        write_bundle(out, 0, overwrite=True)
        assert left_beside(out) == [], operation
    assert version_of(out) == 1
    assert left_beside(out) == []


def test_a_kill_where_names_cannot_be_exchanged_at_once_is_mended_by_the_next(tmp_path):
    out = tmp_path / "out"
    write_bundle(out, 0)
    for operation in kills(write_without_exchange, out):
        with claim(out):
            pass
        assert version_of(out) in (0, 1), operation
        assert left_beside(out) == [], operation
        write_bundle(out, 0, overwrite=True)


def write_without_exchange(out: Path) -> None:
    import ctypes

    ctypes.CDLL = lambda *_, **__: object()
    write_bundle(out, 1, overwrite=True)


def record(out: Path) -> None:
    """Record three shards of made-up numbers; goes on where it was killed."""
    with claim(out):
        record_claimed(out)


def record_claimed(out: Path) -> None:
    manifest = toy_manifest()
    if (out / "manifest.json").is_file():
        begun = read_manifest(out)
        writer = TraceWriter(out, begun)
        remove_unlisted(out, writer.entries.values())
    else:
        writer = TraceWriter.begin(out, manifest, random_anchors(3, seed=0), overwrite=False)
    for shard_idx in range(3):
        if shard_idx not in writer.entries:
            shard = writer.begin_shard(2, shard_idx)
            batch, sums = random_batch(manifest, seed=shard_idx)
            shard.add_batch(batch)
            writer.finish_shard(shard, sums)
    writer.finish("tokens-reached")


def test_a_recording_killed_at_any_change_ends_in_the_same_bytes(tmp_path):
    whole = tmp_path / "whole"
    record(whole)
    expected = {p.name: p.read_bytes() for p in whole.rglob("*.safetensors")}
    for operation in kills(record, tmp_path / "out", step=3):
        out = tmp_path / "out"
        record(out)
        Traces.open(out).verify()
        assert {p.name: p.read_bytes() for p in out.rglob("*.safetensors")} == expected, operation
        assert left_beside(out) == ["whole"], operation
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        out.rmdir()


def test_a_second_writer_is_refused_by_pid_and_host(tmp_path):
    out = tmp_path / "out"
    problems = []

    def write() -> None:
        try:
            write_bundle(out, 1)
        except ValueError as error:
            problems.append(str(error))

    with claim(out):
        with claim(out):  # by the same thread
            pass
        second = threading.Thread(target=write)
        second.start()
        second.join()
    assert f"is being written by process {os.getpid()} on {socket.gethostname()}" in problems[0]
    write_bundle(out, 2)
    assert left_beside(out) == []


def test_two_processes_never_write_at_once(tmp_path):
    out = tmp_path / "out"
    for _ in range(3):
        assert run_ranks(3, write_or_be_refused, out) == [0] * 3
        assert version_of(out) == 5
        assert left_beside(out) == []


def write_or_be_refused(out: Path) -> None:
    for _ in range(5):
        try:
            write_bundle(out, 5, overwrite=True)
        except ValueError as error:
            assert "is being written by" in str(error)  # noqa: PT017


def test_a_stale_lock_is_taken_over_and_a_strange_one_is_not(tmp_path):
    out, lock = tmp_path / "out", tmp_path / "out.lock"
    stale = {"foreroute_lock_of": "out", "pid": 4194304, "host": socket.gethostname()}
    lock.write_text(json.dumps(stale))
    write_bundle(out, 1)
    assert not lock.exists()
    lock.write_text(json.dumps(stale | {"host": "elsewhere"}))
    with pytest.raises(ValueError, match=r"process 4194304 on elsewhere.* if it has ended, remove"):
        write_bundle(out, 2, overwrite=True)
    lock.write_text("my own notes about locks")
    with pytest.raises(ValueError, match="is no lock file of foreroute"):
        write_bundle(out, 2, overwrite=True)
    assert lock.read_text() == "my own notes about locks"
    assert version_of(out) == 1


def test_only_what_carries_the_mark_is_replaced(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex and was not written by foreroute"):
        write_bundle(mine, 1, overwrite=True)
    theirs = tmp_path / "theirs"
    write_bundle(theirs, 1)
    (theirs / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"also holds notes\.txt, which foreroute did not write"):
        write_bundle(theirs, 2, overwrite=True)
    assert version_of(theirs) == 1
    with pytest.raises(ValueError, match="holds a bundle, which --overwrite does not replace"):
        require_free(theirs, "run", overwrite=True)
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_a_users_folders_beside_the_output_stay(tmp_path):
    names = ["out.partial", "out.partial-1-ab", "out.old", "out.partial-3-cdef0123"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("keep")
    write_bundle(tmp_path / "out", 1)
    write_bundle(tmp_path / "out", 2, overwrite=True)
    assert left_beside(tmp_path / "out") == sorted(names)


def test_what_is_read_is_not_overwritten(tmp_path):
    out = tmp_path / "bundles" / "out"
    write_bundle(out, 1)
    for given in (out, out / "manifest.json", tmp_path / "bundles" / ".." / "bundles" / "out"):
        with pytest.raises(ValueError, match="would remove"):
            require_free(out, "bundle", overwrite=True, inputs=[given])
    with pytest.raises(ValueError, match="was not written by foreroute"):
        require_free(out / "..", "bundle", overwrite=True)
    require_free(out, "bundle", overwrite=True, inputs=[tmp_path, None, "bundled"])


def test_a_linked_output_is_written_where_the_link_leads(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    write_bundle(tmp_path / "link", 1)
    write_bundle(tmp_path / "link", 2, overwrite=True)
    assert version_of(tmp_path / "disk" / "out") == 2
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["x" * 255, "file/out"])
def test_a_place_that_cannot_be_is_known_at_once(tmp_path, name):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"File name too long|Not a directory|File exists"),
        claim(tmp_path / name),
    ):
        pass


def test_unfinished_files_do_not_follow_links_and_have_the_usual_mode(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("keep")
    (tmp_path / "x.json.partial").symlink_to(victim)
    (tmp_path / "x.json").symlink_to(victim)
    write_json(tmp_path / "x.json", {"a": 1})
    write_tensors(tmp_path / "t.safetensors", {"x": torch.zeros(2)})
    (tmp_path / "plain").touch()
    modes = {(tmp_path / n).stat().st_mode for n in ("x.json", "t.safetensors", "plain")}
    assert len(modes) == 1
    assert victim.read_text() == "keep"
    with pytest.raises(RuntimeError), new_file(tmp_path / "y"):
        raise RuntimeError
    assert not list(tmp_path.glob("y*"))


def test_the_mark_says_what_a_folder_is(tmp_path):
    write_command(tmp_path, "run")
    assert kind_of(tmp_path) == "run"
    assert kind_of(tmp_path / "absent") is None


def test_states_that_are_not_finite_are_not_recorded(tmp_path):
    manifest = toy_manifest()
    writer = TraceWriter.begin(tmp_path / "t", manifest, None, overwrite=False)
    batch, _ = random_batch(manifest, seed=0)
    batch.records[1].residual[3, 2] = torch.nan
    with pytest.raises(ValueError, match="Layer 1 gives residual that is not finite, in shard 0"):
        writer.begin_shard(2, 0).add_batch(batch)
