"""Non-finite losses and gradients change nothing, and the average is that of its definition."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from diffusers import UNet2DModel
from safetensors.torch import load_file

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.objectives import TimestepSampler
from ddpm_notes_pipeline.training.arguments import RunArguments
from ddpm_notes_pipeline.training.learner import Learner
from ddpm_notes_pipeline.training.run import reset_accelerate
from ddpm_notes_pipeline.training.updates import AveragedWeights, UpdateGuard, poisoned
from tests.support.comparing import assert_same, losses, rows
from tests.support.devices import DEVICE
from tests.support.launching import TINY, TRAIN, error_lines
from tests.support.no_sync import META, HostSync, no_sync

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def own_accelerate():
    """Accelerate's state is the process's: take over none, and leave none behind."""
    reset_accelerate()
    yield
    reset_accelerate()


# -------------------------------------------------------------------- in the small


class Scaled(Accelerator):
    """With fp16's loss scaler, which accelerate refuses to make on a CPU and torch does not."""

    def __init__(self, scale: float) -> None:
        super().__init__(cpu=DEVICE.type == "cpu")
        self.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
        self.native_amp = True

    def unscale_gradients(self, optimizer=None):
        for one in self._optimizers:
            self.scaler.unscale_(one.optimizer)


class Run:
    """One weight per input; the loss of an image is (weight * input)^2."""

    def __init__(self, limit=3, scale=None, fused=True):
        self.accelerator = Accelerator(cpu=DEVICE.type == "cpu") if scale is None else Scaled(scale)
        self.weight = torch.nn.Linear(2, 1, bias=False, device=DEVICE)
        self.fill(1)
        optimizer = torch.optim.AdamW(self.weight.parameters(), lr=0.1, fused=fused)
        self.network, self.optimizer = self.accelerator.prepare(self.weight, optimizer)
        self.optimizer.scaler = self.accelerator.scaler
        if scale is not None:
            self.optimizer.__setstate__({})
        self.guard = UpdateGuard(self.accelerator, limit)
        self.average = AveragedWeights(self.weight.parameters(), 0.9, "constant", 1.0, 0.75)
        self.steps = 0

    def fill(self, value):
        with torch.no_grad():
            self.weight.weight.fill_(value)

    def step(self, *x, gradient=None):
        """A batch of images (x, 0), at timesteps 10, 11, ...; `gradient`: added to the weights'
        own.
        """
        self.steps += 1
        inputs = torch.tensor([[value, 0.0] for value in x], device=DEVICE)
        loss = self.network(inputs).square().flatten()
        self.accelerator.backward(poisoned(loss.mean()))
        if gradient is not None:
            self.weight.weight.grad += gradient
        norm = self.accelerator.clip_grad_norm_(self.weight.parameters(), 1.0)
        taken = self.guard.update(self.optimizer, norm)
        self.optimizer.zero_grad()
        self.average.step(self.weight.parameters(), taken)
        self.guard.watch(self.steps, torch.arange(10, 10 + len(x)), loss.detach(), norm)
        return self

    def state(self):
        (moments,) = self.optimizer.optimizer.state.values()
        return {
            "weight": self.weight.weight.detach().clone(),
            "average": self.average.shadow_params[0].clone(),
            **{name: value.clone() for name, value in moments.items()},
        }


BAD = {
    "a loss that is NaN": {"x": (1.0, NAN)},
    "an infinite loss": {"x": (1.0, INF)},
    # 4e38, 8e13
    "a loss too large for its type, whose gradient is a number": {"x": (2e-6,), "weight": 1e25},
    "an infinite gradient": {"x": (1.0,), "gradient": INF},
    "a gradient that is NaN": {"x": (1.0,), "gradient": NAN},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_a_non_finite_update_changes_no_bit(case, fused):
    run = Run(fused=fused).step(1.0, 2.0).step(3.0)
    run.fill(BAD[case].get("weight", 2))
    before = run.state()
    run.step(*BAD[case]["x"], gradient=BAD[case].get("gradient"))
    assert_same(run.state(), before)
    run.guard.check()
    assert (run.guard.skipped, run.guard.in_a_row, run.guard.scale_skipped) == (1, 1, 0)
    run.fill(2)
    run.step(1.0)
    run.guard.check()
    assert (run.guard.skipped, run.guard.in_a_row) == (1, 0)
    assert float(run.weight.weight.detach().max()) < 2 and float(run.state()["step"]) == 3


def test_poisoned_keeps_the_gradient_of_a_finite_loss_bit_for_bit():
    x = torch.linspace(-3, 3, 50, requires_grad=True)
    (plain,) = torch.autograd.grad(x.pow(3).mean(), x)
    (guarded,) = torch.autograd.grad(poisoned(x.pow(3).mean()), x)
    assert torch.equal(plain, guarded) and torch.equal(poisoned(x.pow(3).mean()), x.pow(3).mean())


def test_a_row_of_skipped_updates_ends_the_run_with_a_diagnosis(capsys):
    run = Run(limit=3).step(1.0).step(NAN).step(1.0)
    run.guard.check()
    assert "skipped 1 update(s) that were not finite, 1 so far; step 2: loss nan" in capsys.readouterr().err
    run.step(NAN).step(1.0, 1.0).step(INF).step(1.0, 2.0, NAN, INF)
    run.guard.check()  # as often as it likes: the row goes on
    assert (run.guard.skipped, run.guard.in_a_row) == (4, 2)
    run.step(1.0, 2.0, INF, 4.0, INF).step(1.0)
    message = (
        r"no finite update in 3 steps in a row .*step 8: loss inf \(not finite at timesteps 12, 14\), gradient norm nan"
    )
    with pytest.raises(FloatingPointError, match=message):
        run.guard.check()


def test_a_non_finite_gradient_alone_is_described_by_the_largest_loss():
    run = Run(limit=1).step(1.0, 3.0, 2.0, gradient=INF)
    with pytest.raises(
        FloatingPointError, match=r"step 1: loss 4.667 \(largest at timestep 11\), gradient norm (inf|nan)"
    ):
        run.guard.check()


def test_a_row_of_skipped_updates_may_span_a_resumed_run():
    first = Run(limit=3).step(NAN).step(NAN)
    first.guard.check()
    reset_accelerate()
    second = Run(limit=3)
    second.guard.load_state_dict(json.loads(json.dumps(first.guard.state_dict())))
    second.step(NAN)
    with pytest.raises(FloatingPointError, match="in 3 steps in a row"):
        second.guard.check()


def test_finding_the_loss_scale_raises_no_alarm():
    """A gradient of 32 fits a float32, which ends at 2^128, from a scale of 2^122 downwards."""
    run = Run(limit=2, scale=2.0**126)
    for _ in range(6):
        run.step(4.0)
    run.guard.check()
    assert run.guard.scale_skipped == 4 and (run.guard.skipped, run.guard.in_a_row) == (0, 0)
    assert run.accelerator.scaler.get_scale() == 2.0**122
    assert float(run.state()["step"]) == 2  # of 6


def test_a_non_finite_loss_is_not_taken_for_a_loss_scale_that_is_too_large():
    run = Run(limit=2, scale=1024.0).step(1.0)
    before = run.state()
    run.step(1.0, NAN).step(1.0, NAN)
    assert_same(run.state(), before)
    with pytest.raises(FloatingPointError, match=r"in 2 steps in a row"):
        run.guard.check()


def test_a_gradient_that_no_loss_scale_helps_ends_the_run():
    run = Run(limit=3, scale=4.0)
    for _ in range(10):
        run.step(1.0, gradient=NAN)
        try:
            run.guard.check()
        except FloatingPointError:
            break
    # scale 4 -> 2 -> 1 are the scaler's; then three in a row
    assert (run.guard.scale_skipped, run.guard.skipped) == (2, 3)
    assert run.weight.weight.tolist() == [[1, 1]]


@pytest.mark.parametrize("is_cpu", [None, False])
def test_an_average_on_any_device_is_that_of_its_definition(is_cpu, monkeypatch):
    """In float64, of the weights after each step; the third step is skipped.

    With `is_cpu` False also by the kernels of an accelerator, on the CPU.
    """
    run, expected, seen = Run(), None, []
    step = type(run.average).step

    def elsewhere(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cpu", False)
            step(*arguments)

    if is_cpu is False:
        monkeypatch.setattr(type(run.average), "step", elsewhere)
    for x in (1.0, 2.0, NAN, 3.0):
        run.step(x)
        weight = run.weight.weight.detach().double().cpu()
        if not math.isnan(x):
            expected = weight if expected is None else 0.9 * expected + 0.1 * weight
        seen.append((run.average.shadow_params[0].double().cpu(), expected, weight))
    for average, right, _ in seen:
        torch.testing.assert_close(average, right, rtol=1e-6, atol=1e-8)
    assert float((seen[-1][0] - seen[-1][2]).abs().max()) > 1e-2, "the average is the weights: nothing was tested"


def test_non_finite_losses_stay_out_of_the_timestep_sampler():
    sampler, clean = TimestepSampler(3, "loss_second_moment", 2), TimestepSampler(3, "loss_second_moment", 2)
    t, values = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.tensor([1.0, NAN, 2.0, 3.0, 4.0, -INF, INF])
    sampler.update(t, values)
    clean.update(t[values.isfinite()], values[values.isfinite()])
    assert_same(sampler.state_dict(), clean.state_dict())
    assert sampler.counts.tolist() == [2, 1, 1]


# -------------------------------------------------------------------- on a device without values


def meta_learner(variance_type="fixed_small", **settings) -> Learner:
    """A learner on the device "meta", with AdamW's fused kernel as on CUDA."""
    accelerator = Accelerator(cpu=True)
    for state in (PartialState(), AcceleratorState()):
        state.device = META
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2 if variance_type.startswith("learned") else 1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
        dropout=0.1,
    ).to(META)
    run = RunArguments(train_batch_size=4, max_train_steps=10, **settings)
    learner = Learner(accelerator, unet.train(), DDPMNotesScheduler(variance_type=variance_type), run)
    optimizer = learner.optimizer.optimizer
    for group in (optimizer.defaults, *optimizer.param_groups):
        group["fused"] = True  # torch has that kernel on "meta", and refuses to start with it there
    for parameter in unet.parameters():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=META), **moments}
    learner.schedule(0, 10, 2)
    return learner


def device_step(learner: Learner) -> dict:
    """A step on a batch from the CPU, as a loader gives it."""
    batch = {
        "pixel_values": torch.zeros(4, 1, 8, 8, dtype=torch.uint8),
        "noise": torch.zeros(4, 1, 8, 8),
        "u": torch.linspace(0, 0.9, 4, dtype=torch.float64),
        "class_labels": torch.tensor([0, 1, 2, 0]),
    }
    with no_sync():
        return learner.update(0, batch)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_weighting": "min_snr", "timestep_sampling": "stratified"},
        {"gradient_accumulation_steps": 2, "ema_schedule": "constant"},
        {"objective": "hybrid", "variance_type": "learned_range"},
        {"objective": "vlb", "use_ema": False},
    ],
    ids=str,
)
def test_no_training_step_waits_for_the_device(settings):
    """From the batch to the average; what is logged stays there until it is read."""
    learner = meta_learner(**settings)
    row = device_step(learner)
    assert row["loss"].device == row["grad_norm"].device == META
    assert [norm.device for *_, norm in learner.guard.waiting] == [META]


def test_timesteps_by_the_losses_before_wait_for_them():
    """The one setting whose next step needs the numbers of this one, as its docstring says."""
    with pytest.raises(HostSync):
        device_step(meta_learner(objective="vlb", timestep_sampling="loss_second_moment"))


# -------------------------------------------------------------------- in real runs

DRIVER = """
import os, runpy, sys
import torch
from ddpm_notes_pipeline.objectives import Objective
def call(self, *args, original=Objective.__call__, calls=[0], **kwargs):
    calls[0] += 1
    spoiled = calls[0] in {calls} and os.environ.get("RANK", "0") == "{rank}"
    return original(self, *args, **kwargs) * ({value} if spoiled else 1)
Objective.__call__ = call
compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self: compile(self, backend="aot_eager")  # writes no machine code, which takes minutes
runpy.run_path({train!r}, run_name="__main__")
"""


def spoiled(path: Path, calls: list[int], rank: int = 0, value: str = "float('nan')") -> Path:
    """A driver of train.py that spoils the loss in some calls of the objective on one rank.

    The objective is called once per step and part of the batch.
    """
    code = DRIVER.format(train=str(TRAIN), calls=calls, rank=rank, value=value)
    path.write_text(code)
    return path


def history(folder: Path, steps: int = 12) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Weights and their average after each step, in the order of the network's parameters."""
    names = [name for name, _ in DDPMNotesPipeline.from_pretrained(folder).unet.named_parameters()]
    found = []
    for step in range(1, steps + 1):
        raw = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        average = load_file(folder / f"checkpoint-{step}" / "ema.safetensors")
        assert raw.keys() == set(names)
        found.append(([raw[name] for name in names], [average[key] for key in sorted(average)]))
    return found


def assert_averages(found: list, decay_at: Callable[[int], float], left_out: Sequence[int] = ()) -> None:
    """The average recomputed in float64 from the weights after each step n (from 0).

    Skipped steps count for nothing.
    """
    expected = [torch.zeros_like(value, dtype=torch.float64) for value in found[0][0]]
    moved = 0.0
    for n, (raw, average) in enumerate(found):
        decay = 0.0 if n == 0 else decay_at(n)
        if n not in left_out:
            expected = [decay * old + (1 - decay) * new.double() for old, new in zip(expected, raw, strict=True)]
        for ours, theirs, new in zip(average, expected, raw, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-8)
            moved = max(moved, float((ours - new).abs().max()))
    assert moved > 1e-3, "the average is the weights: nothing was tested"


EVERY_STEP = [*TINY, "--learning_rate", 1e-2, "--checkpointing_steps", 1, "--output_dir"]
CONSTANT = ["--ema_schedule", "constant", "--ema_max_decay", 0.8]


@pytest.mark.parametrize("schedule", ["warmup", "constant"])
def test_the_average_is_that_of_its_definition(train, tmp_path, schedule):
    flags = ["--ema_schedule", schedule, "--ema_max_decay", 0.8, "--ema_inv_gamma", 0.5, "--ema_power", 0.6]
    train(*EVERY_STEP, tmp_path / "run", *flags)
    ramp = [1 - (1 + n / 0.5) ** -0.6 for n in range(12)]
    assert ramp[4] < 0.8 < ramp[8]
    assert_averages(history(tmp_path / "run"), lambda n: min(0.8, ramp[n]) if schedule == "warmup" else 0.8)


@pytest.mark.slow
def test_a_compiled_network_is_averaged_and_saved_as_any_other(train, tmp_path):
    folder = tmp_path / "run"
    train(*EVERY_STEP, folder, *CONSTANT, "--torch_compile", script=spoiled(tmp_path / "driver.py", []), timeout=200)
    found = history(folder)
    assert_averages(found, lambda n: 0.8)
    saved = DDPMNotesPipeline.from_pretrained(folder).unet.parameters()
    assert_same([parameter.data for parameter in saved], found[-1][1])


@pytest.mark.slow
def test_two_processes_skip_a_step_in_which_one_has_a_non_finite_loss(train, tmp_path):
    """They average the weights that one process would.

    Each has two parts of the batch; rank 1's last in step 5 is spoiled.
    """
    folder, driver = tmp_path / "run", spoiled(tmp_path / "driver.py", [10], rank=1)
    result = train(*EVERY_STEP, folder, *CONSTANT, "--gradient_accumulation_steps", 2, processes=2, script=driver)
    assert "on 2 process(es) of cpu" in result.stdout
    assert result.stderr.count("skipped 1 update(s) that were not finite, 1 so far; step 5: loss nan") == 1
    found = history(folder)
    assert_same(found[4], found[3])
    assert_averages(found, lambda n: 0.8, left_out=[4])
    assert [row["step"] for row in rows(folder) if row["loss"] is None] == [5]


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_skipped_step_changes_the_learning_rate_alone(train, tmp_path, value):
    """The next step is as if this one's number had passed without a batch."""
    folder = tmp_path / "run"
    result = train(*EVERY_STEP, folder, *CONSTANT, script=spoiled(tmp_path / "driver.py", [5, 6], value=value))
    found = history(folder)
    assert_same(found[4], found[3]), assert_same(found[5], found[3])
    before, after = (torch.load(folder / f"checkpoint-{step}" / "optimizer.bin") for step in (4, 6))
    assert_same(after["state"], before["state"])
    assert after["param_groups"][0]["lr"] != before["param_groups"][0]["lr"]
    assert_averages(found, lambda n: 0.8, left_out=[4, 5])
    updates = [json.loads((folder / f"checkpoint-{n}" / "manifest.json").read_text())["updates"] for n in range(4, 8)]
    assert [(update["skipped"], update["in_a_row"]) for update in updates] == [(0, 0), (1, 1), (2, 2), (2, 0)]
    assert [row["step"] for row in rows(folder) if row["loss"] is None or row["grad_norm"] is None] == [5, 6]
    assert all(map(math.isfinite, losses(folder)[6:])) and "NaN" not in (folder / "loss.jsonl").read_text()
    assert "updates skipped, not finite: 2;" in result.stdout
    assert "loss nan over" not in result.stdout


def test_a_run_of_skipped_updates_stops_with_a_diagnosis_and_can_resume_from_before(train, tmp_path):
    """The count of steps in a row continues after resuming."""
    flags = [*TINY, "--checkpointing_steps", 3, "--logging_steps", 100, "--max_nonfinite_steps", 4]
    flags += ["--output_dir", tmp_path / "run"]
    driver = spoiled(tmp_path / "driver.py", list(range(5, 13)))
    result = train(*flags, script=driver, expect=1)
    (line,) = [line for line in error_lines(result) if line.startswith("train.py")]
    assert "no finite update in 4 steps in a row (--max_nonfinite_steps); at the last one, step 8: loss nan" in line
    assert f"{tmp_path}/run/checkpoint-6 is left. Resume: python {TRAIN} " in line
    assert not (tmp_path / "run" / "model_index.json").exists()
    again = train(*flags, "--resume_from_checkpoint", "latest", script=spoiled(driver, [1, 2]), expect=1)
    assert "no finite update in 4 steps in a row" in again.stderr and "step 8: loss nan" in again.stderr
    train(*flags, "--resume_from_checkpoint", "latest")
    assert all(map(math.isfinite, losses(tmp_path / "run")[6:])) and len(rows(tmp_path / "run")) == 12


def test_a_learning_rate_that_wrecks_the_weights_ends_the_run(train, tmp_path):
    flags = ["--learning_rate", 1e30, "--lr_warmup_steps", 0, "--logging_steps", 2, "--output_dir", tmp_path / "run"]
    result = train(*TINY, *flags, expect=1)
    assert "no finite update in 10 steps in a row" in error_lines(result)[-1]
    assert not (tmp_path / "run" / "model_index.json").exists()
