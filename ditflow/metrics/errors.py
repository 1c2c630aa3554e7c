"""The error of everything that is passed to a metric and cannot be used."""

from __future__ import annotations

from ditflow.errors import DitflowError


class MetricInputError(DitflowError, ValueError):
    """Frames, tracks, values, weights or options that a metric cannot use; the code says which."""

    default_code = "metric-input-invalid"
