"""Motion of a reference video: targets, where they come from (`sources`), and statistics of them."""

from __future__ import annotations

from ditflow.motion.statistics import MotionStatistics, consecutive, motion_statistics, pixels_per_second
from ditflow.motion.target import MotionTarget

__all__ = ["MotionStatistics", "MotionTarget", "consecutive", "motion_statistics", "pixels_per_second"]
