"""Which commands a tuning runs, for one model and machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foreroute.runtime.tune.steps import Step


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a user asks of `foreroute tune`."""

    model: str
    """`bundled`, a local folder or a Hub id."""
    out: Path
    """Where everything goes."""
    dataset: str
    """As collect-traces takes it."""
    tokens: int
    """To record."""
    form: str
    """Form of the estimators."""
    expert_slots: str
    """Slots per MoE layer that are measured: a number, a share such as 25%, or auto."""
    device: str
    """auto, cpu or cuda."""
    gpu_memory: str | None
    """To plan for; None plans nothing."""
    host_memory: str | None
    """To plan for."""
    revision: str | None
    """Branch, tag or commit of a Hub id."""
    prompt: str | None
    """Gone on with at the end; None for nothing."""
    trust_remote_code: bool
    """Run code that came with the checkpoint."""
    is_held: bool = True
    """Whether the device holds the whole model; if not, it is recorded in an engine."""

    def steps(self) -> list[Step]:
        """The commands, in order."""
        out, name = self.out, ("--model", self.model)
        trust = ("--trust-remote-code",) if self.trust_remote_code else ()
        model = (*name, *(("--revision", self.revision) if self.revision else ()), *trust)
        on = ("--device", self.device)
        traces, run, bundle = (str(out / part) for part in ("traces", "run", "bundle"))
        profile = str(out / "profile.json")
        steps = [
            Step("doctor", ("foreroute", "doctor", *model)),
            Step("profile", ("foreroute", "profile", "--out", profile, *on), ("--overwrite",)),
        ]
        if self.gpu_memory is not None and self.host_memory is not None:
            memory = ("--gpu-memory", self.gpu_memory, "--host-memory", self.host_memory)
            plan = ("foreroute", "plan", *model, *memory, "--profile", profile)
            to = ("--json", str(out / "plan.json"))
            steps.append(Step("plan", (*plan, *to), reads=("profile",)))
        amount = ("--tokens", str(self.tokens), "--generated-share", "0.25", "--batch-size", "16")
        engine = () if self.is_held else ("--expert-slots", self.expert_slots)
        record = ("collect-traces", *model, "--dataset", self.dataset, *amount, *on, *engine)
        fit = ("train-estimator", "--traces", traces, "--layers", "all", "--form", self.form)
        slots = ("--expert-slots", self.expert_slots)
        measure = ("foreroute", "bench", *model, "--bundle", bundle, *slots, "--num-prompts", "3")
        files = ("--json", str(out / "bench.json"), "--html", str(out / "bench.html"))
        export = ("export-estimator", "--run", run, "--out", bundle)
        draw = ("foreroute", "report", "--run", run, "--bundle", bundle)
        steps += [
            Step("collect", (*record, "--out", traces)),
            Step("train", (*fit, "--out", run, *on), ("--resume",), reads=("collect",)),
            Step("export", export, _ANEW, reads=("train",)),
            Step("report", (*draw, "--out", str(out / "report"), *on), _ANEW, reads=("export",)),
            Step("bench", (*measure, "--dataset", self.dataset, *on, *files), reads=("export",)),
        ]
        if self.prompt is not None:
            say = ("foreroute", "generate", *model, "--bundle", bundle, *slots, *on)
            steps.append(Step("generate", (*say, "--prompt", self.prompt), reads=("export",)))
        return steps


_ANEW = ("--overwrite",)
