"""A compiled network gives the same samples and the same bits/dim, to the rounding of float32.

The network is the trained one of examples/ddpm-mnist, compiled to machine code as a user would.
"""

import pytest
import torch

from ddpm_notes_pipeline import DDPMNotesPipeline
from ddpm_notes_pipeline.data import load_images, to_model_range
from tests.support.launching import ROOT

STEPS = 20
LARGEST_DIFFERENCE = 1e-4  # of a pixel in [-1, 1] behind all steps, and of the noise in a network's output


@pytest.mark.slow
def test_a_compiled_network_changes_samples_and_bits_by_rounding_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    pipe = DDPMNotesPipeline.from_pretrained(ROOT / "examples" / "ddpm-mnist")
    pipe.set_progress_bar_config(disable=True)
    images = to_model_range(load_images("mnist", split="test", max_samples=4).take(range(4)))

    @torch.no_grad()
    def run() -> tuple[torch.Tensor, torch.Tensor, float]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        samples = pipe(4, num_inference_steps=STEPS, generator=generators, output_type="latent").images
        output = pipe.predict(samples, torch.full((4,), 10))
        return output, samples, pipe.bits_per_dim(images, num_inference_steps=STEPS, full=True, batch_size=4).total

    output, samples, bits = run()
    pipe.unet.to(memory_format=torch.channels_last).compile(options={"cpp_wrapper": True})
    compiled_output, compiled_samples, compiled_bits = run()
    assert list((tmp_path / "compiled").rglob("*.so")), "nothing was compiled"
    difference = float((compiled_output - output).abs().max())
    print(f"largest difference {difference:.1e}; bits/dim {bits:.7f}, compiled {compiled_bits:.7f}")
    assert 0 < difference < LARGEST_DIFFERENCE, "a difference of 0 means that the compiled code did not run"
    # the samples are levels, in which the rounding may well vanish
    assert samples.std() > 0.3 and (compiled_samples - samples).abs().max() < LARGEST_DIFFERENCE
    assert compiled_bits == pytest.approx(bits, rel=1e-6)
