"""What the commands take as MODEL, and the input that fits it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from cvfast.cli.output import fail

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cvfast.tolerance import Verdict

MODEL_HELP = "NAME of `cvfast list`, torchvision:NAME, timm:NAME or path/to/file.py:factory."

CALIBRATION_BATCH = 4

DTYPES = ("float32", "bfloat16", "float16")


def load(spec: str) -> nn.Module:
    """The network that `spec` names, in eval mode, with the same random weights each time.

    The batch norms of a network without trained weights are calibrated on random images; what a
    file's factory makes is left as it is.

    Raises:
        typer.Exit: with code 2, after a message, where `load_model` raises.
    """
    import torch

    from cvfast.zoo import calibrate_batch_norms, load_model

    torch.manual_seed(0)
    try:
        model = load_model(spec)
    except (ValueError, TypeError, AttributeError, OSError, ModuleNotFoundError) as error:
        raise fail(str(error)) from error
    if ".py:" in spec:
        return model
    return calibrate_batch_norms(model, example(input_shape(spec, model), CALIBRATION_BATCH))


def dtype(name: str) -> torch.dtype:
    """The torch dtype of one of `DTYPES`.

    Raises:
        typer.Exit: with code 2, after a message, for any other name.
    """
    import torch

    if name not in DTYPES:
        raise fail(f"unknown dtype {name!r}; choose from {', '.join(DTYPES)}")
    return getattr(torch, name)


def input_shape(spec: str, model: nn.Module, size: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) that a network was made for; `size` overrides height and width, in pixels.

    cvfast's own come from the registry, timm's from their configuration; others get the channels
    of their first convolution and 224 pixels, 299 for an Inception v3.
    """
    from torch import nn

    from cvfast.models import default_input_size, list_models

    convolutions = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    config = getattr(model, "pretrained_cfg", None) or {}
    if spec in list_models():
        shape = default_input_size(spec)
    elif "input_size" in config:
        shape = tuple(config["input_size"])
    else:
        side = 299 if spec.endswith(":inception_v3") else 224
        shape = (next(convolutions, 3), side, side)
    return shape if size is None else (shape[0], size, size)


def example(shape: tuple[int, int, int], batch: int) -> torch.Tensor:
    """(batch, C, H, W) float32 of normal random numbers, the same each time."""
    import torch

    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


class Truth:
    """What a network's outputs should be, in float64, and what eager PyTorch makes of it."""

    def __init__(self, model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> None:
        import torch

        from cvfast.perf.peers import flatten

        with torch.no_grad():
            try:
                self.expected = flatten(copy.deepcopy(model).double()(x.double()))
            except RuntimeError as error:
                raise fail(f"the network has no float64 run to compare with: {error}") from error
            self.baseline = flatten(copy.deepcopy(model).to(dtype)(x.to(dtype)))

    def check(self, outputs: list[torch.Tensor], *, k: float | None = None) -> Verdict:
        """The verdict of `cvfast.tolerance` on the outputs of a network: the worst of all tensors.

        Outputs that were widened to float32 after computing in a narrower type are judged in it.
        """
        from cvfast.tolerance import K_NETWORK, Verdict, check

        if len(outputs) != len(self.expected):
            message = f"{len(outputs)} output tensors, expected {len(self.expected)}"
            return Verdict(False, error=float("inf"), message=message)
        verdicts = [
            check(actual.to(baseline.dtype), expected, baseline, k=K_NETWORK if k is None else k)
            for actual, expected, baseline in zip(
                outputs, self.expected, self.baseline, strict=True
            )
        ]
        return max(verdicts, key=lambda verdict: (not verdict.ok, verdict.error))
