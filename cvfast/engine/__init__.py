"""Execution of whole networks: kernel calls recorded into plans over one arena. See docs/engine.md."""
