"""Measurement: environment, interleaved timing, FLOPs, peak rates, and the peers compared with."""

from __future__ import annotations
