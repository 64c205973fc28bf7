"""A config.json with a value that cannot be is one line with file and field, soon."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config

from foreroute.data.adapters.config_file import check_config_file
from foreroute.data.adapters.loading import load_config
from foreroute.runtime.planning.doctor import diagnose
from foreroute.runtime.planning.plan_report import run_plan

BAD_FIELDS: dict[str, tuple[Any, ...]] = {
    "num_experts_per_tok": ("2", 2.0, None, [2], 0, 16),
    "num_local_experts": ("8", 8.0, 10**12),
    "num_hidden_layers": (2**63, 10**6, 0, -1, 1.5, "3"),
    "num_attention_heads": (0, -4, 2**40),
    "num_key_value_heads": (-1,),
    "hidden_size": (0, 2**40, "64"),
    "vocab_size": (2**60, -1),
    "dtype": ("float12", 0, [], "nn"),
    "rope_parameters": ("default", 3),
    "rms_norm_eps": (float("nan"), float("inf"), "small"),
    "self": (1,),
}


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny model's config with other values in some fields; gives the folder."""

    def write(**fields: Any) -> Path:
        values = tiny_config("qwen3_moe").to_dict()
        (tmp_path / "config.json").write_text(json.dumps(values | fields))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in BAD_FIELDS for value in BAD_FIELDS[field]]
)
def test_a_bad_field_is_named_by_doctor_and_plan(
    broken: Callable[..., Path], field: str, value: Any
) -> None:
    folder = str(broken(**{field: value}))
    for read in (diagnose, plan):
        with pytest.raises(ValueError, match=field) as refused:
            read(folder)
        assert "config.json cannot be used" in str(refused.value)
        assert "\n" not in str(refused.value)


def plan(folder: str) -> None:
    run_plan(folder, "1GiB", "2GiB", "h100-pcie5", 4096, None)


@pytest.mark.parametrize(
    "content", ["", "{not json", "[]", '"text"', "7", "[" * 10_000, '{"a":' * 10_000, "\ud800"]
)
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"config\.json cannot be used: ") as refused:
        load_config(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_fields_of_inner_configs_are_named_with_the_way_to_them(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": {"num_hidden_layers": 2**63}}))
    with pytest.raises(ValueError, match=r"text_config\.num_hidden_layers is 9223372036854775808"):
        check_config_file(path)


def test_values_that_no_rule_knows_are_refused_when_the_model_is_built(
    broken: Callable[..., Path],
) -> None:
    folder = str(broken(pad_token_id=10**6))
    for read in (diagnose, plan):
        with pytest.raises(ValueError, match=r"cannot build a qwen3_moe model .* Padding_idx"):
            read(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", "x"),
        ("eos_token_id", [[1]]),
        ("bos_token_id", 1.5),
        ("forced_eos_token_id", 10**6),
        ("num_beams", 10**12),
        ("num_beams", "2"),
        ("max_time", "x"),
        ("temperature", float("nan")),
        ("guidance_scale", "x"),
        ("watermarking_config", "x"),
        ("stop_strings", 3),
    ],
)
def test_a_bad_field_of_the_generation_config_is_named(
    broken: Callable[..., Path], field: str, value: Any
) -> None:
    path = broken() / "generation_config.json"
    usual = {"_from_model_config": True, "eos_token_id": [1, 2], "stop_strings": ["a"], "top_k": 5}
    path.write_text(json.dumps(usual))
    load_config(str(path.parent))
    path.write_text(json.dumps({field: value}))
    with pytest.raises(ValueError, match=rf"generation_config\.json cannot be used: {field} is"):
        load_config(str(path.parent))


def test_plan_refuses_what_doctor_refuses(tmp_path: Path) -> None:
    tiny_config("jetmoe").save_pretrained(tmp_path)
    for read in (diagnose, plan):
        with pytest.raises(ValueError, match="so it is not supported"):
            read(str(tmp_path))
    tiny_config("qwen3_moe", quantization_config={"quant_method": "hqq"}).save_pretrained(tmp_path)
    for read in (diagnose, plan):
        with pytest.raises(ValueError, match="hqq"):
            read(str(tmp_path))
