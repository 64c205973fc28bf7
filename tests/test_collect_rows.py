"""Rows that are token ids, and chats, are recorded as they are."""

import json

import pytest
import torch

from foreroute.data.adapters import load_tokenizer
from foreroute.data.collect import CollectRequest, collect_traces
from foreroute.data.layout import DECODE, PREFILL
from foreroute.data.live_traces import LiveTraces
from foreroute.data.opening import open_traces

LENGTH = 16


def rows_of_ids(num_rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 250, (num_rows, LENGTH), generator=generator).tolist()


def collect(tiny_moe, dataset, out, **flags):
    return collect_traces(
        model=str(tiny_moe.folder), dataset=str(dataset), out=out, sequence_length=LENGTH, **flags
    )


def test_rows_that_a_model_continued_are_recorded_as_they_are(tiny_moe, tmp_path):
    rows = [{"ids": ids, "end": i % LENGTH, "id": "x"} for i, ids in enumerate(rows_of_ids(12))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = {"tokens": 10 * LENGTH, "column": "ids", "prompt_tokens": "end", "batch_size": 4}
    traces = collect(tiny_moe, tmp_path / "a.jsonl", tmp_path / "traces", **asked)
    tokens = traces.tokens(0)
    recorded = tokens.token_ids.unflatten(0, (-1, LENGTH)).tolist()
    ends = {tuple(row["ids"]): row["end"] for row in rows}
    phases = tokens.phases.unflatten(0, (-1, LENGTH))
    assert len(recorded) == 10
    for ids, made in zip(recorded, phases, strict=True):
        end = ends[tuple(ids)]
        assert made.tolist() == [PREFILL] * end + [DECODE] * (LENGTH - end)
    with torch.no_grad():
        stock = tiny_moe.model(torch.tensor(recorded), output_router_logits=True).router_logits
    for layer_idx, logits in enumerate(stock):
        chosen = logits.topk(2).indices.sort().values
        assert torch.equal(traces.record(layer_idx, 0).expert_ids.sort().values, chosen)
    again = collect(tiny_moe, tmp_path / "a.jsonl", tmp_path / "traces", **asked)
    assert again.num_tokens == traces.num_tokens, "the same command finds nothing to do"
    with pytest.raises(ValueError, match="recorded with prompt_tokens end, now prompt_tokens is 3"):
        collect(
            tiny_moe, tmp_path / "a.jsonl", tmp_path / "traces", **asked | {"prompt_tokens": "3"}
        )


def test_live_traces_know_the_same_rows(tiny_moe, tmp_path):
    rows = [{"input_ids": ids} for ids in rows_of_ids(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    request = CollectRequest(
        out=tmp_path / "live",
        model=str(tiny_moe.folder),
        dataset=str(tmp_path / "a.jsonl"),
        tokens=4 * LENGTH,
        sequence_length=LENGTH,
        prompt_tokens="5",
    )
    tokenizer, manifest = load_tokenizer(str(tiny_moe.folder)), request.manifest(tiny_moe.moe)
    live = LiveTraces.begin(tiny_moe.moe, tokenizer, manifest, tmp_path / "live")
    phases = torch.cat([live.tokens(shard.shard_idx).phases for shard in live.manifest.shards])
    assert (phases == DECODE).sum() == 4 * (LENGTH - 5)
    reopened = open_traces(tmp_path / "live")
    assert torch.equal(reopened.tokens(0).token_ids, live.tokens(0).token_ids)


def test_generating_after_rows_that_were_generated_is_refused(tiny_moe, tmp_path):
    with pytest.raises(ValueError, match="continued already"):
        collect(tiny_moe, tmp_path, tmp_path / "out", prompt_tokens="3", source="generated")


def test_chats_are_recorded_by_the_template_and_without_one_refused(
    tiny_moe, make_tiny_moe, tmp_path
):
    chats = [{"messages": [{"role": "user", "content": f"hello {i}, you"}]} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, chats)))
    with pytest.raises(ValueError, match="The tokenizer has no chat template"):
        collect(tiny_moe, tmp_path / "a.jsonl", tmp_path / "none", tokens=64)
    assert not (tmp_path / "none").exists()
    other = make_tiny_moe()
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (other.folder / "chat_template.jinja").write_text(template)
    traces = collect(other, tmp_path / "a.jsonl", tmp_path / "traces", tokens=64)
    text = load_tokenizer(str(other.folder)).decode(traces.tokens(0).token_ids)
    assert text.count("[user]hello") >= 3
    assert "<eos>" not in text


def test_a_tokenizer_of_another_model_is_refused(make_tiny_moe, text_dataset, tmp_path):
    small = make_tiny_moe(vocab_size=40)
    with pytest.raises(ValueError, match="the model's vocabulary has only 40 tokens"):
        collect(small, text_dataset, tmp_path / "out", tokens=64)
    for file in small.folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no tokenizer: none of its files"):
        collect(small, text_dataset, tmp_path / "out", tokens=64)
