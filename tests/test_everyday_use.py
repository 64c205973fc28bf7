"""What people do around a model: threads, Ctrl-C, saving, adapters; the output stays right."""

import contextlib
import copy
import gc
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, LogitsProcessorList

from foreroute.estimators.artifacts import read_tensors
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.host.transfers import ImmediateTransfers
from foreroute.runtime.store.offload import load_offloaded, offload
from foreroute.runtime.store.whole_model import move_checkpoint

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 12).unsqueeze(0)
GREEDY = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}


def stock_of(folder: Path, **settings: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    model.set_experts_implementation("batched_mm")
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def engine_of(folder: Path, **settings: Any) -> Engine:
    return Engine.from_pretrained(str(folder), device="cpu", **({"expert_slots": "3"} | settings))


@pytest.mark.parametrize("settings", [{}, {"prefetch": "all"}, {"cache": "none"}])
def test_threads_are_answered_one_after_the_other(folder: Path, settings: dict[str, Any]) -> None:
    stock, prompts = stock_of(folder), [torch.arange(3, 8 + i).unsqueeze(0) for i in range(4)]
    expected = [stock.generate(prompt, **GREEDY) for prompt in prompts]
    wrong: list[Any] = []
    with engine_of(folder, **settings) as engine:

        def ask(number: int) -> None:
            for _ in range(3):
                try:
                    if not torch.equal(
                        engine.generate(prompts[number], **GREEDY), expected[number]
                    ):
                        wrong.append(number)
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.check_integrity()
    assert not wrong


def test_a_forward_pass_is_over_before_another_thread_begins_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    with engine_of(folder) as engine:
        for name in ("begin_forward", "end_forward"):
            own = getattr(engine.driver, name)

            def note(*args: Any, own: Any = own, name: str = name) -> None:
                own(*args)
                seen.append(name)

            monkeypatch.setattr(engine.driver, name, note)
        hook = engine.model.register_forward_hook(lambda *_: time.sleep(0.05))
        threads = [threading.Thread(target=engine.model, args=(TOKENS,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hook.remove()
    assert seen == ["begin_forward", "end_forward"] * 3


@pytest.mark.parametrize("settings", [{}, {"prefetch": "all"}, {"eviction": "static"}])
def test_an_engine_is_right_after_an_interrupt_at_any_copy(
    folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stock_of(folder).generate(TOKENS, **GREEDY)
    copy_now, left = ImmediateTransfers.copy, [0]

    def copy_or_break(self: Any, pairs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            copy_now(self, pairs[: len(pairs) // 2])
            raise KeyboardInterrupt
        return copy_now(self, pairs)

    monkeypatch.setattr(ImmediateTransfers, "copy", copy_or_break)
    with engine_of(folder, **settings) as engine:
        for number in range(1, 7):
            left[0] = number
            engine.driver.forget()
            with pytest.raises(KeyboardInterrupt):
                engine.generate(TOKENS, **GREEDY)
            engine.check_integrity()
            assert torch.equal(engine.generate(TOKENS, **GREEDY), expected)


def test_an_interrupt_while_slots_are_filled_leaves_the_engine_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with engine_of(folder) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(ImmediateTransfers, "copy", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.fill_slots()
        engine.check_integrity()
        assert torch.equal(engine(TOKENS).logits, stock_of(folder)(TOKENS).logits)


def test_an_exception_in_a_processor_leaves_the_engine_right(folder: Path) -> None:
    expected = stock_of(folder).generate(TOKENS, **GREEDY)

    def fail(*_: Any) -> Any:
        raise LookupError("no")

    with engine_of(folder) as engine:
        with pytest.raises(LookupError):
            engine.generate(TOKENS, logits_processor=LogitsProcessorList([fail]), **GREEDY)
        assert torch.equal(engine.generate(TOKENS, **GREEDY), expected)


def test_a_saved_model_has_its_experts(folder: Path, tmp_path: Path) -> None:
    expected = stock_of(folder)(TOKENS).logits
    with engine_of(folder) as engine:
        engine.model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
        engine.model.save_pretrained(folder)  # its own
        assert torch.equal(engine(TOKENS).logits, expected)
    for saved in (tmp_path / "saved", folder):
        assert torch.equal(stock_of(saved)(TOKENS).logits, expected)
        assert not list(saved.glob(".saving*"))


class Killed(BaseException):
    """Stands for a kill: nobody catches it."""


def die_after(monkeypatch: pytest.MonkeyPatch, num_changes: int) -> None:
    left = iter(range(num_changes))

    def or_die(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(path: Path, *args: Any, **settings: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return change(path, *args, **settings)

        return changed

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, or_die(getattr(Path, name)))


@pytest.mark.parametrize("eps", [1e-6, 1e-2])  # the second is a change of the config
@pytest.mark.parametrize(
    "sizes",
    [("5GB", "5GB"), ("5GB", "400KB"), ("400KB", "5GB"), ("400KB", "400KB"), ("400KB", "300KB")],
)
def test_a_checkpoint_moved_over_another_and_killed_at_any_change_is_never_a_mixture(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[str, str],
    eps: float,
) -> None:
    old, new = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", seed=1, rms_norm_eps=eps)
    for num_changes in itertools.count():
        place = tmp_path / str(num_changes)
        for model, to, size in zip((old, new), (place, place / ".saving-x"), sizes, strict=True):
            model.save_pretrained(to, max_shard_size=size)
        right = [stock_of(path)(TOKENS).logits for path in (place, place / ".saving-x")]
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            die_after(patched, num_changes)
            move_checkpoint(place / ".saving-x", place)
            break
        try:
            found = stock_of(place)(TOKENS).logits
            assert any(torch.equal(found, logits) for logits in right)
        except OSError:  # refused, and nothing is lost
            for path in (place / ".saving-x").iterdir():
                path.replace(place / path.name)
            assert torch.equal(stock_of(place)(TOKENS).logits, right[1])
    assert torch.equal(stock_of(place)(TOKENS).logits, right[1])
    assert not (place / ".saving-x").exists()


def test_experts_in_fewer_bits_are_saved_decoded(tmp_path: Path) -> None:
    offloaded = offload(tiny_model("mixtral"), device=CPU, expert_dtype="int8")
    with Engine(offloaded, EngineConfig(expert_slots="4")) as engine:
        engine.model.save_pretrained(tmp_path)
        expected = engine(TOKENS).logits
    assert torch.equal(stock_of(tmp_path)(TOKENS).logits, expected)


def test_state_counts_and_copies_are_those_of_the_whole_model(folder: Path) -> None:
    stock = stock_of(folder)
    with engine_of(folder) as engine, torch.no_grad():
        assert engine.model.num_parameters() == stock.num_parameters()
        stock.load_state_dict(engine.model.state_dict(), strict=True)
        copied = copy.deepcopy(engine.model)
        assert torch.equal(copied(TOKENS).logits, engine(TOKENS).logits)
        state = {name: tensor * 1.5 for name, tensor in stock.state_dict().items()}
        stock.load_state_dict(state)
        engine.model.load_state_dict(state)  # what is in the slots is old now
        assert torch.equal(engine(TOKENS).logits, stock(TOKENS).logits)


def test_what_the_experts_could_not_follow_is_refused(folder: Path) -> None:
    with engine_of(folder) as engine:
        before = engine(TOKENS).logits
        with pytest.raises(ValueError, match=r"in torch\.float32; .* load it so"):
            engine.model.to(torch.bfloat16)
        with pytest.raises(ValueError, match="load it there"):
            engine.model.to("meta")
        assert torch.equal(engine.model.to("cpu")(TOKENS).logits, before)


LORA = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "router": {"target_modules": ["gate"]},
}


@pytest.mark.parametrize("name", LORA)
def test_adapters_change_the_output_as_they_change_stocks(
    folder: Path, tmp_path: Path, name: str
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, init_lora_weights=False, **LORA[name])
    peft.get_peft_model(stock_of(folder), settings).save_pretrained(tmp_path / "lora")
    stock = peft.PeftModel.from_pretrained(stock_of(folder), tmp_path / "lora").eval()
    with engine_of(folder) as engine, torch.no_grad():
        before = engine(TOKENS).logits
        engine.generate(TOKENS, **GREEDY)
        adapted = peft.PeftModel.from_pretrained(engine.model, tmp_path / "lora").eval()
        expected = stock(TOKENS).logits
        assert not torch.equal(expected, before)
        assert torch.equal(adapted(TOKENS).logits, expected)
        assert torch.equal(engine.generate(TOKENS, **GREEDY), stock.generate(TOKENS, **GREEDY))
        with adapted.disable_adapter():
            assert torch.equal(engine(TOKENS).logits, before)
        merged = adapted.merge_and_unload(safe_merge=True)
        expected = stock.merge_and_unload(safe_merge=True)(TOKENS).logits
        assert torch.equal(engine(TOKENS).logits, expected)
        merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(stock_of(tmp_path / "merged")(TOKENS).logits, expected)


def test_an_adapter_for_experts_in_fewer_bits_is_refused(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    with engine_of(folder, expert_dtype="int8") as engine:
        adapted = peft.get_peft_model(engine.model, peft.LoraConfig(r=2, **LORA["experts"]))
        with pytest.raises(ValueError, match="merge it into the checkpoint first"):
            adapted(TOKENS)


def test_an_adapter_in_the_models_folder_is_used(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, init_lora_weights=False, **LORA["attention"] | LORA["experts"])
    peft.get_peft_model(stock_of(folder), settings).save_pretrained(folder)
    expected = stock_of(folder)(TOKENS).logits
    with engine_of(folder) as engine:
        assert torch.equal(engine(TOKENS).logits, expected)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "phimoe"])
def test_autocast_gives_stocks_logits(model_type: str) -> None:
    model, tokens = tiny_model(model_type), torch.arange(3, 40).unsqueeze(0)
    stock = copy.deepcopy(model)
    stock.set_experts_implementation("batched_mm")
    offloaded = offload(model, device=CPU)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.no_grad(),
        Engine(offloaded, EngineConfig(expert_slots="4")) as engine,
    ):
        assert torch.equal(engine(tokens).logits, stock(tokens).logits)


def test_an_engine_that_was_dropped_lets_the_next_one_attach(folder: Path) -> None:
    offloaded = load_offloaded(str(folder), device="cpu")
    expected = stock_of(folder)(TOKENS).logits
    for _ in range(2):
        engine = Engine(offloaded, EngineConfig(expert_slots="4"))
        assert torch.equal(engine(TOKENS).logits, expected)
        del engine
        gc.collect()


def test_a_closed_engine_says_so_and_its_model_is_a_whole_one(folder: Path) -> None:
    expected = stock_of(folder)(TOKENS).logits
    with engine_of(folder) as engine:
        model = engine.model
    with pytest.raises(ValueError, match="was closed"):
        engine.generate(TOKENS, **GREEDY)
    model.set_experts_implementation("batched_mm")
    assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_load_under_another_default_and_under_inference_mode(
    folder: Path, dtype: torch.dtype
) -> None:
    expected = stock_of(folder)(TOKENS).logits
    try:
        torch.set_default_dtype(dtype)
        with torch.inference_mode():
            engine = engine_of(folder)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    with engine:
        assert torch.equal(engine(TOKENS).logits, expected)
        assert not any(parameter.is_inference() for parameter in engine.model.parameters())


def test_models_load_in_several_threads(folder: Path) -> None:
    expected, logits = stock_of(folder)(TOKENS).logits, []

    def load() -> None:
        with engine_of(folder) as engine:
            logits.append(engine(TOKENS).logits)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(logits) == 3
    assert all(torch.equal(one, expected) for one in logits)


def test_a_model_built_under_inference_mode_is_taken_over() -> None:
    expected = tiny_model("mixtral", tie_word_embeddings=True)
    expected.set_experts_implementation("batched_mm")
    with torch.inference_mode():
        model = tiny_model("mixtral", tie_word_embeddings=True)
    with Engine.from_pretrained(model, device="cpu", expert_slots="4") as engine:
        assert torch.equal(engine(TOKENS).logits, expected(TOKENS).logits)
        assert engine.model.lm_head.weight is engine.model.model.embed_tokens.weight
        assert torch.equal(engine.generate(TOKENS, **GREEDY), expected.generate(TOKENS, **GREEDY))


@pytest.mark.parametrize("moment", [1, 20, 60])
def test_an_interrupt_while_a_tensor_is_read_stays_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    looked, calls = torch.UntypedStorage.__getitem__, 0

    def interrupted(storage: Any, index: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        return looked(storage, index)

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "__getitem__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine_of(folder)
        calls = moment - 1
        with pytest.raises(KeyboardInterrupt):
            read_tensors(folder / "model.safetensors")
    with engine_of(folder) as engine:
        assert torch.equal(engine(TOKENS).logits, stock_of(folder)(TOKENS).logits)
