"""Collecting resumes to the same bytes, stays within limits, and refuses what it cannot use."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeForCausalLM

import foreroute.data.collection as collection
from foreroute.data.cli import main
from foreroute.data.collect import collect_traces
from foreroute.data.manifest import read_manifest
from foreroute.data.trace_writer import TraceWriter
from foreroute.data.traces import Traces

SEQUENCES = 12
LENGTH = 32


@pytest.fixture
def arguments(tiny_moe, text_dataset, tmp_path):
    """3 shards of 4 sequences of 32 tokens, a quarter of each generated."""
    return {
        "model": str(tiny_moe.folder),
        "dataset": str(text_dataset),
        "tokens": SEQUENCES * LENGTH,
        "out": tmp_path / "out",
        "sequence_length": LENGTH,
        "generated_share": 0.25,
        "batch_size": 2,
        "shard_tokens": 4 * LENGTH,
        "device": "cpu",
    }


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "command.txt"  # holds the time
    }


def command_of(arguments):
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in arguments.items()]
    return [part for flag in flags for part in flag]


def run_cli(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["collect-traces", *command_of(arguments)])
    main()


def test_collected_traces_hold_what_was_asked_for(arguments):
    traces = collect_traces(**arguments)
    traces.verify()
    manifest = traces.manifest
    assert (traces.num_tokens, traces.num_sequences) == (SEQUENCES * LENGTH, SEQUENCES)
    assert [shard.num_sequences for shard in manifest.shards] == [4, 4, 4]
    assert manifest.stop_reason == "tokens-reached"
    assert traces.record(0, 0).residual.dtype == torch.bfloat16  # auto, of a float32 model
    assert traces.record(0, 0).gate_weights.dtype == torch.float32
    assert "--shard-tokens 128" in manifest.command
    assert not list(arguments["out"].rglob("*.partial"))
    assert "time: " in (arguments["out"] / "command.txt").read_text()


def test_a_device_map_records_the_same(arguments, tmp_path):
    pytest.importorskip("accelerate")
    plain = collect_traces(**arguments)
    mapped = collect_traces(**(arguments | {"out": tmp_path / "mapped", "device_map": "auto"}))
    for layer_idx in range(4):
        tensors = mapped.record(layer_idx, 0).tensors
        for name, tensor in plain.record(layer_idx, 0).tensors.items():
            assert torch.equal(tensors[name], tensor)


def test_gpus_that_cannot_hold_the_model_are_refused_in_one_line(arguments, monkeypatch):
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu"}
    monkeypatch.setattr(Qwen3MoeForCausalLM, "hf_device_map", places, raising=False)
    with pytest.raises(ValueError, match=r"model.layers.1 and more .*--expert-slots"):
        collect_traces(**(arguments | {"device_map": "auto"}))
    assert not arguments["out"].exists()


def test_tokens_are_rounded_up_to_whole_sequences(arguments):
    traces = collect_traces(**(arguments | {"tokens": 5 * LENGTH - 1}))
    assert [shard.num_sequences for shard in traces.manifest.shards] == [4, 1]


def test_seeds_change_the_continuation_and_nothing_else(arguments, tmp_path):
    first = collect_traces(**arguments).tokens(0).token_ids.view(4, LENGTH)
    again = collect_traces(**(arguments | {"out": tmp_path / "b", "seed": 1})).tokens(0)
    other = again.token_ids.view(4, LENGTH)
    assert torch.equal(first[:, :24], other[:, :24])
    assert not torch.equal(first[:, 24:], other[:, 24:])


@pytest.mark.parametrize("fail_at_batch", [0, 1, 3, 5])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    arguments, tmp_path, monkeypatch, fail_at_batch
):
    collect_traces(**(arguments | {"out": tmp_path / "whole"}))
    record_batch, calls = collection.record_batch, []

    def fail_later(*rest):
        calls.append(1)
        if len(calls) > fail_at_batch:
            raise KeyboardInterrupt
        return record_batch(*rest)

    with monkeypatch.context() as patched:
        patched.setattr(collection, "record_batch", fail_later)
        with pytest.raises(KeyboardInterrupt):
            collect_traces(**arguments)
    assert len(read_manifest(arguments["out"]).shards) == fail_at_batch // 2
    with pytest.raises(ValueError, match="unfinished"):
        Traces.open(arguments["out"])

    collect_traces(**arguments)
    assert files_of(arguments["out"]) == files_of(tmp_path / "whole")


def test_a_kill_before_the_last_write_is_finished_by_the_same_command(arguments, monkeypatch):
    def fail(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(TraceWriter, "finish", fail)
        with pytest.raises(OSError, match="power cut"):
            collect_traces(**arguments)
    assert not read_manifest(arguments["out"]).is_complete
    assert collect_traces(**arguments).num_sequences == SEQUENCES


def test_what_a_kill_left_half_written_is_removed(arguments, tmp_path, monkeypatch):
    collect_traces(**(arguments | {"out": tmp_path / "whole"}))

    def fail(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(collection.TraceWriter, "_write_manifest", fail)
        with pytest.raises(OSError, match="power cut"):
            collect_traces(**arguments)
    (arguments["out"] / "layer_001" / "shard_00000.safetensors.partial").write_bytes(b"half")
    (arguments["out"] / "layer_001" / "shard_00007.safetensors").write_bytes(b"stray")

    collect_traces(**arguments)
    assert files_of(arguments["out"]) == files_of(tmp_path / "whole")


def test_a_killed_process_resumes_to_the_same_bytes(arguments, tmp_path):
    arguments |= {"tokens": 60 * LENGTH}
    program = "from foreroute.data.cli import main; main()"
    command = [sys.executable, "-c", program, *command_of(arguments)]
    # One thread each: the same kernels, whatever else the machine does.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    manifest = arguments["out"] / "manifest.json"
    while process.poll() is None:
        if manifest.exists() and read_manifest(arguments["out"]).shards:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait()
    assert not read_manifest(arguments["out"]).is_complete, "it finished before it was killed"

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    collect_traces(**arguments)
    collect_traces(**(arguments | {"out": tmp_path / "whole"}))
    torch.set_num_threads(num_threads)
    assert files_of(arguments["out"]) == files_of(tmp_path / "whole")


def test_complete_traces_are_left_alone(arguments):
    collect_traces(**arguments)
    before = files_of(arguments["out"])
    collect_traces(**arguments)
    assert files_of(arguments["out"]) == before


def test_an_exhausted_dataset_gives_what_it_had(arguments):
    arguments |= {"tokens": 10**7, "sequence_length": 256, "shard_tokens": 10**4}
    arguments |= {"generated_share": 0, "batch_size": 16}
    traces = collect_traces(**arguments)
    assert traces.manifest.stop_reason == "dataset-exhausted"
    assert 0 < traces.num_tokens < 10**5
    assert collect_traces(**arguments).num_tokens == traces.num_tokens


def test_max_bytes_stops_cleanly_and_more_bytes_go_on(arguments, tmp_path):
    whole = collect_traces(**(arguments | {"out": tmp_path / "whole"}))
    limit = int(whole.manifest.num_bytes * 0.75)
    traces = collect_traces(**arguments, max_bytes=str(limit))
    traces.verify()
    assert traces.manifest.stop_reason == "max-bytes"
    assert traces.manifest.num_bytes <= limit
    assert len(traces.manifest.shards) == 2

    collect_traces(**arguments)
    assert files_of(arguments["out"]) == files_of(tmp_path / "whole")


def test_overwrite_replaces_what_was_there(arguments):
    collect_traces(**(arguments | {"seed": 5}))
    traces = collect_traces(**arguments, overwrite=True)
    assert traces.manifest.seed == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "recorded with seed 0, now seed is 3"),
        ({"sequence_length": 64}, "recorded with sequence_length 32"),
        ({"split": "held-out"}, "recorded with split train, now split is held-out"),
    ],
)
def test_other_arguments_are_not_mixed_in(arguments, change, message):
    collect_traces(**arguments)
    before = files_of(arguments["out"])
    with pytest.raises(ValueError, match=message):
        collect_traces(**(arguments | change))
    assert files_of(arguments["out"]) == before


def test_another_models_traces_are_not_mixed_in(arguments, make_tiny_moe):
    collect_traces(**arguments)
    other = make_tiny_moe(num_experts=4)
    with pytest.raises(ValueError, match=r"made for .*8 experts.*this model is .*4 experts"):
        collect_traces(**(arguments | {"model": str(other.folder)}))


def test_a_damaged_shard_is_named_before_anything_is_added(arguments):
    collect_traces(**arguments)
    shard = arguments["out"] / "layer_003" / "shard_00001.safetensors"
    shard.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"layer_003/shard_00001\.safetensors is damaged"):
        collect_traces(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "./nowhere"}, "There is no model folder at ./nowhere"),
        ({"dataset": "./nowhere"}, "There is no dataset at ./nowhere"),
        ({"split": "test"}, "Unknown split 'test'; known: train, held-out"),
        ({"dtype": "int3"}, "Unknown dtype 'int3'"),
        ({"states_dtype": "int3"}, "Unknown dtype 'int3'"),
        ({"device": "abacus"}, "Unknown device"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"generated_share": 1.5}, "generated_share must be between 0 and 1"),
        ({"max_bytes": "many"}, "'many' is no size"),
        ({"max_bytes": "2kB"}, "is less than one shard"),
        ({"sequence_length": 10**6}, "one sequence needs"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(
    arguments, monkeypatch, capsys, change, message
):
    with pytest.raises(SystemExit) as ended:
        run_cli(arguments | change, monkeypatch)
    assert ended.value.code == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("collect-traces: error: ")
    assert message in last
    assert not arguments["out"].exists()


def test_a_dense_model_and_an_empty_dataset_are_refused(arguments, tiny_moe, tmp_path):
    dense = tmp_path / "dense"
    shutil.copytree(tiny_moe.folder, dense)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(dense)
    with pytest.raises(ValueError, match="not a Mixture-of-Experts model"):
        collect_traces(**(arguments | {"model": str(dense)}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no text in its train split"):
        collect_traces(**(arguments | {"dataset": str(tmp_path / "empty")}))
    assert not arguments["out"].exists()


def test_a_folder_with_something_else_is_not_written_to(arguments):
    arguments["out"].mkdir()
    (arguments["out"] / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists already"):
        collect_traces(**arguments)
    assert files_of(arguments["out"]) == {"thesis.tex": b"years of work"}


def test_too_small_a_disk_is_refused(arguments, monkeypatch):
    monkeypatch.setattr(collection, "free_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match=r"take about .* but only 1 kB are free"):
        collect_traces(**arguments)
    assert not arguments["out"].exists()


def test_the_command_names_the_model_and_ends_with_the_path(arguments, monkeypatch, capsys, caplog):
    run_cli(arguments, monkeypatch)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(arguments["out"])
    assert "288 / 96" in printed
    assert "4 MoE layers, 8 experts, top-2" in caplog.text
    assert "Size: about" in caplog.text
    assert "Recorded 384 tokens, " in caplog.text
