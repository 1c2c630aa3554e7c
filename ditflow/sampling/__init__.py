"""Sampling: the denoising loop, motion guidance within it, and what guidance optimises."""
