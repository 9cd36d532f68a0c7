"""Writes torchvision_state_dicts.json: keys, shapes and their order of torchvision's networks.

Run it from the root of the repository where torchvision is installed:

    python tests/models/make_golden.py

An entry "bn.*": [64] stands for the five tensors of a batch normalisation over 64 channels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.nn as nn

from cvfast.zoo import import_torchvision, load_model

NETWORKS: list[tuple[str, dict[str, Any]]] = [
    *((f"resnet{depth}", {}) for depth in (18, 34, 50, 101, 152)),
    ("googlenet", {}),
    ("googlenet", {"aux_logits": False}),
    ("inception_v3", {}),
    ("inception_v3", {"aux_logits": False}),
    ("mobilenet_v2", {}),
    ("mobilenet_v2", {"width_mult": 0.35}),
    ("mobilenet_v2", {"width_mult": 1.4}),
    ("mobilenet_v3_small", {}),
    ("mobilenet_v3_large", {}),
    ("mobilenet_v3_large", {"width_mult": 0.75}),
    *((f"densenet{depth}", {}) for depth in (121, 161, 169, 201)),
    ("fcn_resnet50", {}),
    ("fcn_resnet50", {"aux_loss": True}),
]


def describe(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every tensor of the state dict, batch normalisations folded into one entry."""
    bns = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    entries: dict[str, list[int]] = {}
    for key, tensor in model.state_dict().items():
        prefix = key.rpartition(".")[0]
        if prefix not in bns:
            entries[key] = list(tensor.shape)
        elif key.endswith(".weight"):
            entries[f"{prefix}.*"] = list(tensor.shape)
    return entries


def main() -> None:
    golden = {
        "torchvision": import_torchvision().__version__.partition("+")[0],
        "networks": [
            {
                "name": name,
                "kwargs": kwargs,
                "state_dict": describe(load_model(f"torchvision:{name}", **kwargs)),
            }
            for name, kwargs in NETWORKS
        ],
    }
    path = Path(__file__).with_name("torchvision_state_dicts.json")
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
