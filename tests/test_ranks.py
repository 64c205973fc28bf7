"""Several processes record and train to the bytes of one, killed and resumed with other numbers."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
from processes import KILLED, run_ranks

from foreroute.data import collection
from foreroute.data.collect import collect_traces
from foreroute.data.manifest import read_manifest
from foreroute.data.recording_run import ShardsElsewhere
from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorSpec
from foreroute.estimators.ranks import Ranks
from foreroute.train.fit import train_estimator
from foreroute.train.parts import part_of
from foreroute.train.run import FitConfig, load_run

LENGTH = 16
LOW_RANK = EstimatorSpec(form="low-rank", rank=2, target_layers=(1, 2, 3))
MLP = EstimatorSpec(form="mlp", width=8, target_layers=(1, 2, 3))
CONFIG = FitConfig(epochs=2, batch_size=128)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "command.txt"
    }


def record(arguments, out, die_at=None, rank=0) -> None:
    """Record, and be killed before a shard if this is the rank that shall be."""
    batches = collection.Collection.batches

    def dying(self, recorder, prompts, shard_idx):
        if shard_idx == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return batches(self, recorder, prompts, shard_idx)

    collection.Collection.batches = dying
    collect_traces(**arguments, out=out)


@pytest.fixture(scope="module")
def arguments(tiny_moe, text_dataset):
    """5 shards of 2 sequences, with everything that draws numbers or runs ahead."""
    return {
        "model": str(tiny_moe.folder),
        "dataset": str(text_dataset),
        "tokens": 10 * 12,
        "sequence_length": LENGTH,
        "generated_share": 0.25,
        "tokens_per_sequence": 12,
        "record": "layer-input,readout",
        "states_dtype": "int8",
        "batch_size": 2,
        "shard_tokens": 2 * 12,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    """The same by one process."""
    out = tmp_path_factory.mktemp("ranks") / "whole"
    assert run_ranks(1, record, arguments, out) == [0]
    return out


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_processes_records_the_bytes_of_one(arguments, whole, tmp_path, num_ranks):
    assert run_ranks(num_ranks, record, arguments, tmp_path / "out") == [0] * num_ranks
    assert files_of(tmp_path / "out") == files_of(whole)


def test_a_killed_recording_goes_on_with_another_number_of_processes(arguments, whole, tmp_path):
    out = tmp_path / "out"
    for num_ranks in (2, 3):  # the fourth shard is never recorded
        assert KILLED in run_ranks(num_ranks, record, arguments, out, 3)
        assert not read_manifest(out).is_complete
    assert run_ranks(1, record, arguments, out) == [0]
    assert files_of(out) == files_of(whole)


class Apart(Ranks):
    """One of several machines that talk, but have disks of their own; here one after the other."""

    def first(self, function):
        return function()

    def gather(self, value):
        return [value]

    def wait(self):
        pass


def record_apart(arguments, out, rank) -> None:
    from foreroute.data import collect

    collect.joined_ranks = lambda: contextlib.nullcontext(Apart(rank, 2))
    with pytest.raises(ShardsElsewhere, match="Copy their folders"):
        collect_traces(**arguments, out=out)


def test_folders_of_several_disks_are_copied_together(arguments, whole, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for rank, out in enumerate(folders):
        assert run_ranks(1, record_apart, arguments, out, rank) == [0]
        with pytest.raises(ValueError, match="unfinished"):
            Traces.open(out)
    shutil.copytree(folders[1], folders[0], dirs_exist_ok=True)
    assert run_ranks(1, record, arguments, folders[0]) == [0]
    assert files_of(folders[0]) == files_of(whole)


def train(traces, spec, out, resume=False, die_at=None) -> None:
    """Train, and be killed in an epoch."""
    from foreroute.train.module import EstimatorModule

    step = EstimatorModule.training_step

    def dying(self, batch, batch_idx):
        if self.current_epoch == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_idx)

    EstimatorModule.training_step = dying
    train_estimator(traces, spec, CONFIG, out, device="cpu", resume=resume)


@pytest.mark.parametrize("spec", [LOW_RANK, MLP], ids=["low-rank", "mlp"])
def test_layers_by_process_give_the_estimators_of_one(tiny_traces, tmp_path, spec):
    for num_ranks in (1, 2, 3):
        out = tmp_path / str(num_ranks)
        assert run_ranks(num_ranks, train, tiny_traces, spec, out) == [0] * num_ranks
    runs = [load_run(tmp_path / str(num_ranks)) for num_ranks in (1, 2, 3)]
    name = "estimators.safetensors"
    for num_ranks, run in zip((2, 3), runs[1:], strict=True):
        assert (tmp_path / str(num_ranks) / name).read_bytes() == (
            tmp_path / "1" / name
        ).read_bytes()
        assert run.metrics["estimator"] == runs[0].metrics["estimator"]
        assert run.metrics["baselines"].keys() == runs[0].metrics["baselines"].keys()


def test_a_killed_training_by_processes_goes_on(tiny_traces, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_ranks(1, train, tiny_traces, LOW_RANK, whole) == [0]
    assert KILLED in run_ranks(2, train, tiny_traces, LOW_RANK, killed, False, 1)
    assert run_ranks(2, train, tiny_traces, LOW_RANK, killed, True) == [0, 0]
    name = "estimators.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_what_shares_parameters_between_layers_is_refused_by_processes(tiny_traces, tmp_path):
    shared = EstimatorSpec(form="shared-mlp", width=8, target_layers=(1, 2, 3))
    out = tmp_path / "out"
    assert 0 not in run_ranks(2, train, tiny_traces, shared, out)
    assert not out.exists()


def test_more_processes_than_layers_are_refused():
    assert part_of(LOW_RANK, Ranks(1, 2)).target_layers == (2, 3)
    with pytest.raises(ValueError, match="4 processes cannot share 3 layers"):
        part_of(LOW_RANK, Ranks(0, 4))
