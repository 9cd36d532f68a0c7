"""Whole networks as plans: kernel calls recorded over one arena. See docs/engine.md."""
