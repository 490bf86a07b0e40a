"""Runs of a few steps, and their records without what may differ."""

from __future__ import annotations

RUN = ("train", "--dataset", "FullColoredDigits", "--algorithm", "Magnitude", "--test_envs", 2, "--checkpoint_freq", 10)
