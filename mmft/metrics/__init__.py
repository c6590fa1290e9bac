"""Caption metrics, one implementation for reward terms and evaluation: plain functions here, no torch.

The same metrics as `evaluate` modules are in `mmft.metrics.modules`: `evaluate` imports torch, so they stay apart.
"""
