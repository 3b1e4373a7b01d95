"""What a card can do, from its vendor's datasheet: dense, without sparsity."""

# TFLOP/s by name as CUDA gives it. Cards of one name differ (SXM, PCIe): only those are here whose
# name says which they are.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": {"bf16": 312, "TF32": 156, "float32": 19.5},
    "NVIDIA A100-SXM4-80GB": {"bf16": 312, "TF32": 156, "float32": 19.5},
    "NVIDIA H100 80GB HBM3": {"bf16": 989, "TF32": 494, "float32": 67},
    "NVIDIA H200": {"bf16": 989, "TF32": 494, "float32": 67},
}


def utilization(card: str, arithmetic: str, flops_per_second: float) -> float | None:
    """MFU, model FLOPs utilization: the share of the card's peak; None for an unknown card."""
    peak = PEAKS.get(card, {}).get(arithmetic)
    return None if peak is None else flops_per_second / (peak * 1e12)
