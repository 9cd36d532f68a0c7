"""How kernels are launched: parameters, heuristics and tuned tables; no kernel is imported here."""
