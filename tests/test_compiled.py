"""A compiled network gives the same samples and the same bits/dim, to the rounding of float32.

The network is the trained one of examples/ddpm-mnist, compiled to machine code as a user would.
"""

import pytest
import torch

from ddpm_notes_pipeline import DDPMNotesPipeline
from ddpm_notes_pipeline.data import load_images, to_model_range
from tests.support.launching import ROOT

STEPS = 20
LARGEST_DIFFERENCE = 1e-4  # of a pixel in [-1, 1], behind all steps: an eightieth of a level of 8 bits


@pytest.mark.slow
def test_a_compiled_network_changes_samples_and_bits_by_rounding_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    pipe = DDPMNotesPipeline.from_pretrained(ROOT / "examples" / "ddpm-mnist")
    pipe.set_progress_bar_config(disable=True)
    images = to_model_range(load_images("mnist", split="test", max_samples=4).take(range(4)))

    def run() -> tuple[torch.Tensor, float]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        samples = pipe(4, num_inference_steps=STEPS, generator=generators, output_type="latent").images
        return samples, pipe.bits_per_dim(images, num_inference_steps=STEPS, full=True, batch_size=4).total

    plain, bits = run()
    pipe.unet.to(memory_format=torch.channels_last).compile(options={"cpp_wrapper": True})
    compiled, compiled_bits = run()
    assert list((tmp_path / "compiled").rglob("*.so")), "nothing was compiled"
    spread = float((compiled - plain).abs().max())
    print(f"largest difference {spread:.1e}; bits/dim {bits:.7f}, compiled {compiled_bits:.7f}")
    assert plain.std() > 0.3 and 0 < spread < LARGEST_DIFFERENCE
    assert compiled_bits == pytest.approx(bits, rel=1e-6)
