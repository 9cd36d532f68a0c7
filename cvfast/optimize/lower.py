"""Lower: a captured graph -> a program whose convolution sites are kernel calls."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from cvfast import backends, env, extension
from cvfast.engine.target import CPU, Target
from cvfast.launch.depthwise import Problem
from cvfast.launch.depthwise.cuda import tileable
from cvfast.ops.activation import activate_
from cvfast.ops.conv import CPU_ACTIVATIONS as CONV_ACTIVATIONS
from cvfast.ops.conv import CPU_DTYPES as CONV_DTYPES
from cvfast.ops.conv import (
    OneDnnWeight,
    bytes_moved,
    choose_algorithm,
    conv_onednn,
    conv_torch,
    flops,
    fuses_activation,
    onednn_unsupported,
)
from cvfast.ops.conv import prepack as prepack_conv
from cvfast.ops.conv import prepack_gpu as prepack_conv_gpu
from cvfast.ops.depthwise import ACTIVATIONS as DEPTHWISE_ACTIVATIONS
from cvfast.ops.depthwise import KERNEL_DTYPES as DEPTHWISE_DTYPES
from cvfast.ops.depthwise import prepack as prepack_depthwise
from cvfast.ops.fold import fold_batch_norm
from cvfast.ops.layout import channels_innermost, channels_last, is_channels_last, restore_layout
from cvfast.ops.pointwise import ACTIVATIONS as POINTWISE_ACTIVATIONS
from cvfast.ops.pointwise import KERNEL_DTYPES as POINTWISE_DTYPES
from cvfast.ops.pointwise import prepack as prepack_pointwise
from cvfast.ops.pointwise import prepack_gpu as prepack_pointwise_gpu
from cvfast.perf import devices, nvtx

from . import operators
from .capture import Capture, shape_hint
from .flatten import Schedule, flatten
from .match import Leftover, Site, find_sites, read_activation
from .options import Options
from .report import Row, skipped

aten = torch.ops.aten

_KERNELS = {
    target for op in ("pointwise", "conv", "depthwise") for target in operators.operators(op)
}
"""Cvfast's own, which yield fresh memory."""

_CHANNELS_LAST_RESULT = {conv_onednn, channels_last, *_KERNELS}
"""What yields channels-last memory whatever it is given."""

_KEEP_LAYOUT = {
    aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.hardswish.default,
    aten.silu.default, aten.hardsigmoid.default, aten.sigmoid.default, aten.tanh.default,
    aten.gelu.default, aten.leaky_relu.default, aten.elu.default, aten.mish.default,
    aten.clamp.default, aten.batch_norm.default, aten.max_pool2d.default, aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default, aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor,
    aten.cat.default, aten.pad.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
}  # fmt: skip
"""Operators whose result is channels-last when all their 4-D arguments are."""

_FRESH = {
    aten.batch_norm.default, aten.conv2d.default, aten.cat.default, aten.add.Tensor,
    aten.mul.Tensor, aten.linear.default, aten.layer_norm.default, aten.conv_transpose2d.input,
}  # fmt: skip
"""Operators whose result owns its memory, so that a sole reader may overwrite it."""


@dataclass
class _Call:
    """How a site runs: the kernel, its arguments, and how its constants come from the weights."""

    backend: str
    emit: Callable[[fx.Graph, list[fx.Node], fx.Node, fx.Node | None], fx.Node]
    pack: Callable[[Tensor, Tensor | None], tuple[Any, ...]]
    passes: int = 0
    """Elementwise passes over the result that remain beside the kernel."""
    needs_channels_innermost: bool = False
    """Whether the kernel refuses any other layout."""
    fold_dtype: torch.dtype | None = None
    """What folded weights are rounded to; default the site's dtype."""


@dataclass(frozen=True)
class LoweredSite:
    """A site's row, the captured node it stands for, and the program's node in its place."""

    row: Row
    source: fx.Node
    result: fx.Node


MAX_SCHEDULES = 8
"""Sizes of inputs for which a program keeps plans, each with an arena of its own."""


@dataclass
class Program:
    """An executable graph with packed weights, bound to the module whose weights it runs.

    Where the engine serves its device (``planned``) it runs as plans, made for each size of the
    inputs; ``gpu`` is the GPU whose kernels they call, None on the CPU. ``names`` are of modules
    that nodes come from. Safe to run from several threads; :meth:`refresh` is not to run beside
    them.
    """

    capture: Capture
    module: fx.GraphModule
    rows: list[Row]
    sites: list[LoweredSite]
    model: str = ""
    planned: bool = False
    device: torch.device = CPU
    gpu: devices.Device | None = None
    names: dict[fx.Node, str] = field(default_factory=dict)
    alias: bool = False
    _schedules: dict[Any, Schedule | None] = field(default_factory=dict)
    _packed: dict[Any, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _packers: list[Callable[[dict[fx.Node, Tensor]], None]] = field(default_factory=list)
    _wanted: list[fx.Node] = field(default_factory=list)

    def refresh(self, source: nn.Module) -> None:
        """Pack anew from the weights that ``source`` has now."""
        values = self.capture.evaluate_constants(source, self._wanted)
        for pack in self._packers:
            pack(values)
        self._schedules.clear()
        self._packed.clear()

    def __call__(self, flat: Sequence[Any]) -> list[Any]:
        """The results for inputs like the captured ones. To be called with gradients off."""
        # Below autograd an operator call is some 4 us cheaper than under no_grad alone.
        with torch._C._AutoDispatchBelowAutograd():
            if nvtx.enabled():
                return list(_Ranges(self).run(*flat))
            schedule = self.schedule(flat) if self.planned else None
            if schedule is not None:
                return schedule.run(flat)
            result: list[Any] = self.module.forward(*flat)
        return result

    def schedule(self, flat: Sequence[Any]) -> Schedule | None:
        """The plans for inputs like these; None if there is no kernel for any step."""
        sizes = tuple([(v.shape, v.stride()) for v in flat if isinstance(v, Tensor)])
        if self.gpu is None:
            key = (sizes, torch.get_num_threads(), extension.selected_cpu_isa())
        else:
            # A graph keeps the rounding that was chosen when it was captured.
            key = (sizes, torch.backends.cudnn.allow_tf32, None)
        try:
            return self._schedules[key]
        except KeyError:
            pass
        with self._lock:
            if key not in self._schedules:
                if len(self._schedules) >= MAX_SCHEDULES:
                    del self._schedules[next(iter(self._schedules))]
                self._schedules[key] = self._flatten(flat)
            return self._schedules[key]

    def flatten(self, flat: Sequence[Any], memory: torch.device) -> Schedule | None:
        """Plans for inputs like these, in ``memory``: on ``meta``, to be looked at only."""
        target = Target(torch.get_num_threads(), self.gpu, memory, self.alias)
        packed = self._packed if memory == self.device else {}
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            return flatten(self.module, flat, target, self.names, packed)

    def _flatten(self, flat: Sequence[Any]) -> Schedule | None:
        try:
            return self.flatten(flat, self.device)
        except Exception as error:
            warnings.warn(
                f"cvfast cannot plan {self.model}, which runs operator by operator; please report "
                f"this: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def count_layout_copies(self, flat: Sequence[Any]) -> int:
        """Conversions between memory formats in one run."""
        counter = _LayoutCounter(self.module)
        with torch.no_grad():
            counter.run(*flat)
        return counter.copies


class _Ranges(fx.Interpreter):
    """Runs a program with an NVTX range around each site."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.names = {
            site.result: nvtx.name(program.model, site.row.module, site.row.pattern)
            for site in program.sites
        }

    def run_node(self, n: fx.Node) -> Any:
        name = self.names.get(n)
        if name is None:
            return super().run_node(n)
        with nvtx.range(name):
            return super().run_node(n)


class _LayoutCounter(fx.Interpreter):
    copies = 0

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if target in (channels_last, channels_innermost, restore_layout) and result is not args[0]:
            self.copies += 1
        return result


def lower(capture: Capture, source: nn.Module, options: Options, prefix: str = "") -> Program:
    """The program of ``capture`` on the weights of ``source``; ``prefix`` leads the rows' names."""
    sites, leftovers = find_sites(capture)
    return _Lowering(capture, source, options, prefix, sites).build(leftovers)


class _Lowering:
    def __init__(
        self,
        capture: Capture,
        source: nn.Module,
        options: Options,
        prefix: str,
        sites: list[Site],
    ) -> None:
        self.capture = capture
        self.source = source
        self.options = options
        self.prefix = prefix
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.in_channels_last: set[fx.Node] = set()
        self.placeholders: dict[fx.Node, fx.Node] = {}
        self.attributes: list[str] = []
        self.constants: dict[fx.Node, fx.Node] = {}
        self.packed: list[tuple[list[str], Site, _Call]] = []
        self.names: dict[fx.Node, str] = {}
        self.sites = sites
        self.planned = torch.device("cuda") if options.target is not None else None
        self.gpu = _gpu(options, sites)
        self.use_channels_last = _use_channels_last(
            str(options.memory_format), self.planned, self.gpu is not None, sites
        )
        if not self.use_channels_last:
            self.gpu = None

    def build(self, leftovers: list[Leftover]) -> Program:
        rows: dict[fx.Node, Row] = {}
        ends: dict[fx.Node, tuple[Site, _Call]] = {}
        inside: set[fx.Node] = set()
        for site in self.sites:
            row, call = self._plan(site)
            rows[site.conv] = row
            if call is not None:
                ends[site.last] = (site, call)
                inside.update((site.conv, *site.absorbed))
        for leftover in leftovers:
            rows[leftover.node] = skipped(
                self._name(leftover.module), leftover.pattern, leftover.reason, leftover.detail
            )
        lowered: list[LoweredSite] = []
        for node in self.capture.graph.nodes:
            if node in ends:
                site, call = ends[node]
                self.env[node] = self._emit(site, call)
                self.names[self.env[node]] = rows[site.conv].module
                lowered.append(LoweredSite(rows[site.conv], node, self.env[node]))
            elif node in inside or node in self.capture.constant_nodes:
                continue
            else:
                self._copy(node)
        self._reuse_memory()
        root = nn.Module()
        for name in self.attributes:
            setattr(root, name, None)
        module = fx.GraphModule(root, self.graph)
        ordered = [rows[node] for node in self.capture.graph.nodes if node in rows]
        program = Program(
            self.capture, module, ordered, lowered, type(self.source).__name__,
            planned=self._is_planned(), gpu=self.gpu, names=self.names,
            alias=self.options.outputs == "alias",
        )  # fmt: skip
        if self.sites:
            program.device = self.sites[0].device
        self._attach(program)
        program.refresh(self.source)
        module.recompile()
        return program

    def _is_planned(self) -> bool:
        if len({site.device for site in self.sites}) != 1 or not self.use_channels_last:
            return False
        if self.options.target is not None or self.gpu is not None:
            return self.options.target is None
        on_cpu = self.sites[0].device.type == "cpu"
        return on_cpu and self.options.backend in ("auto", "cpu") and bool(extension.load("cpu"))

    def _name(self, module: str) -> str:
        return f"{self.prefix}.{module}" if self.prefix and module else self.prefix or module

    def _plan(self, site: Site) -> tuple[Row, _Call | None]:
        """Which kernel computes the site, if any, and its row in the report."""
        row = Row(self._name(site.module), site.pattern)
        x_shape, w_shape = shape_hint(site.source), shape_hint(site.weight)
        out_shape = shape_hint(site.conv)
        row.flops = flops(x_shape, w_shape, out_shape)
        if site.skip is None and self.options.filter_fn is not None:
            module = self.source.get_submodule(site.module)
            if not self.options.filter_fn(module, row.module):
                site.skip = ("user_filter", "filter_fn said no")
        if site.skip is not None:
            row.reason, row.detail = site.skip
            return row, None
        calls, reason = _candidates(site, self.planned, self.options, self.use_channels_last)
        if not calls:
            row.reason, row.detail = reason
            return row, None
        call = calls[0]
        unfused = bytes_moved(x_shape, w_shape, out_shape, site.dtype.itemsize, len(site.absorbed))
        row.bytes_saved = (
            (len(site.absorbed) - call.passes) * 2 * prod(out_shape) * site.dtype.itemsize
        )
        row.gain = unfused / (unfused - row.bytes_saved)
        if self.options.select == "measure":
            chosen, row.gain = self._measure(site, calls)
            if chosen is None:
                row.reason, row.detail, row.bytes_saved = "slower", f"measured {row.gain:.2f}x", 0
                return row, None
            call = chosen
        row.status, row.backend = "fused", call.backend
        return row, call

    def _measure(self, site: Site, calls: list[_Call]) -> tuple[_Call | None, float]:
        """The fastest of ``calls`` on random data, if any beats the unfused path, and its gain."""
        from . import measured

        names = [call.backend for call in calls]
        on_cpu = site.device.type == "cpu"
        key = measured.key(site, names, self.options.winograd, self.use_channels_last)
        choice = measured.find(key) if on_cpu else None
        if choice is None:
            choice = self._time(site, calls)
            if on_cpu:
                measured.remember(key, choice)
        best, gain = choice
        return next((call for call in calls if call.backend == best), None), gain

    def _time(self, site: Site, calls: list[_Call]) -> tuple[str | None, float]:
        from .measure import choose, kernel_runner, random_inputs, unfused_runner

        constants = self.capture.evaluate_constants(self.source, site.constants)
        inputs = random_inputs(site, self.use_channels_last)
        weight, bias = self._folded(site, constants)
        runners = {
            call.backend: kernel_runner(site, inputs, call.emit, call.pack(weight, bias))
            for call in calls
        }
        return choose(runners, unfused_runner(site, inputs, constants), site.device)

    def _emit(self, site: Site, call: _Call) -> fx.Node:
        if call.needs_channels_innermost:
            x = self._with_channels_innermost(site.source)
        else:
            x = self._in_channels_last(site.source)
        residual = None
        if site.residual is not None and call.needs_channels_innermost:
            residual = self._with_channels_innermost(site.residual)
        elif site.residual is not None:
            residual = self._in_channels_last(site.residual)
        names = [f"packed_{len(self.packed)}_{i}" for i in range(2)]
        constants = [self._attribute(name) for name in names]
        self.packed.append((names, site, call))
        result = call.emit(self.graph, constants, x, residual)
        for node in (result, *result.all_input_nodes):
            if node.op == "call_function":
                node.meta.setdefault("val", site.last.meta["val"])
        if self.use_channels_last:
            self.in_channels_last.add(result)
        return result

    def _in_channels_last(self, node: fx.Node) -> fx.Node:
        """``node``'s value for kernels that are faster on channels-last memory."""
        value = self._value(node)
        if not self.use_channels_last or value in self.in_channels_last:
            return value
        converted = self.graph.call_function(channels_last, (value,))
        converted.meta["val"] = node.meta["val"]
        self.in_channels_last.add(converted)
        self.env[node] = converted
        return converted

    def _with_channels_innermost(self, node: fx.Node) -> fx.Node:
        """``node``'s value for kernels that refuse any other layout; checked where uncertain."""
        value = self._value(node)
        if value.target in _CHANNELS_LAST_RESULT:
            return value
        checked = self.graph.call_function(channels_innermost, (value,))
        checked.meta["val"] = node.meta["val"]
        return checked

    def _value(self, node: fx.Node) -> fx.Node:
        """What stands for ``node`` in the new graph; a constant becomes an attribute if read."""
        if node in self.capture.constant_nodes and node not in self.env:
            name = f"constant_{len(self.constants)}"
            self.constants[node] = self.env[node] = self._attribute(name)
            self.env[node].meta["val"] = node.meta.get("val")
        return self.env[node]

    def _attribute(self, name: str) -> fx.Node:
        node = self.graph.create_node("get_attr", name)
        self.attributes.append(name)
        return node

    def _copy(self, node: fx.Node) -> None:
        if node.op == "output":
            outputs = fx.map_arg(node.args[0], self._output)
            self.graph.output(outputs)
            return
        copied = self.graph.node_copy(node, self._value)
        self.env[node] = copied
        if node in self.capture.owners:
            self.names[copied] = self._name(self.capture.owners[node])
        if node.op == "placeholder":
            self.placeholders[node] = copied
        if node.target in _KEEP_LAYOUT:
            images = [a for a in copied.all_input_nodes if _rank(a) == 4 and a.op != "get_attr"]
            if images and all(a in self.in_channels_last or _is_gate(a) for a in images):
                self.in_channels_last.add(copied)

    def _output(self, node: fx.Node) -> fx.Node:
        if node in self.placeholders:
            return self.placeholders[node]
        value = self._value(node)
        if node in self.capture.constant_nodes and node.op == "call_function":
            # The caller may write to what it gets; this one is computed once.
            return self.graph.call_function(aten.clone.default, (value,))
        images = [i for i in self.capture.inputs if _rank(i) == 4]
        if not self.use_channels_last or _rank(value) < 3 or not images:
            return value
        if _is_contiguous(images[0]) and _lays_out(node):
            return value
        return self.graph.call_function(restore_layout, (value, self.placeholders[images[0]]))

    def _reuse_memory(self) -> None:
        """Let an elementwise step overwrite its argument where it is the sole reader."""
        kernels = (conv_onednn, conv_torch, *_KERNELS)
        for node in list(self.graph.nodes):
            if node.op != "call_function" or read_activation(node) is None:
                continue
            source = node.args[0]
            if source.meta["val"].dtype != node.meta["val"].dtype:
                continue
            fresh = source.op == "call_function" and (
                source.target in _FRESH or source.target in kernels
            )
            if fresh and len(source.users) == 1:
                node.target = _in_place(node.target)

    def _attach(self, program: Program) -> None:
        """Give the program its attributes and the recipes that fill them."""
        module = program.module
        wanted: dict[fx.Node, None] = dict.fromkeys(self.constants)
        for source, attribute in self.constants.items():
            name = str(attribute.target)
            program._packers.append(partial(_store_constant, module, name, source))
        for names, site, call in self.packed:
            wanted.update(dict.fromkeys(site.constants))
            program._packers.append(partial(self._store_packed, module, names, site, call))
        program._wanted = list(wanted)

    def _store_packed(
        self,
        module: nn.Module,
        names: list[str],
        site: Site,
        call: _Call,
        values: dict[fx.Node, Tensor],
    ) -> None:
        packed = call.pack(*self._folded(site, values, call.fold_dtype))
        for name, tensor in zip(names, (*packed, None), strict=False):
            setattr(module, name, tensor)

    @staticmethod
    def _folded(
        site: Site, values: dict[fx.Node, Tensor], dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The site's weight and bias with the batch norm folded in."""
        weight = values[site.weight]
        bias = values[site.bias] if site.bias is not None else None
        norm = site.batch_norm
        if norm is None:
            return weight, bias
        scale = values[norm.weight] if norm.weight is not None else None
        shift = values[norm.bias] if norm.bias is not None else None
        mean, var = values[norm.mean], values[norm.var]
        return fold_batch_norm(weight, bias, mean, var, scale, shift, norm.eps, dtype=dtype)


def _store_constant(
    module: nn.Module, name: str, source: fx.Node, values: dict[fx.Node, Tensor]
) -> None:
    setattr(module, name, values[source])


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _is_gate(node: fx.Node) -> bool:
    """[N, C, 1, 1]: broadcasts over an image without deciding its layout."""
    return shape_hint(node)[2:] == (1, 1)


def _lays_out(node: fx.Node) -> bool:
    """Whether the network itself made this result channels-last."""
    value = node.meta["val"]
    return _rank(node) == 4 and not value.is_contiguous() and is_channels_last(value)


def _is_contiguous(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_contiguous()


def _in_place(target: Any) -> Any:
    packet = getattr(aten, target._schema.name.removeprefix("aten::") + "_", None)
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    return overload or target


def _gpu(options: Options, sites: list[Site]) -> devices.Device | None:
    """The GPU whose kernels the program calls; None if it calls none, or none of Triton's, which
    every plan needs between its convolutions. Interpreted kernels are asked for by name."""
    if options.backend not in ("auto", "triton", "cuda"):
        return None
    if options.target is not None or not sites:
        return options.target
    first = sites[0].conv.meta["val"]
    interpreted = options.backend != "auto" and first.device.type == "cpu"
    served = env.on_cpu("triton") if interpreted else first.is_cuda
    return devices.for_tensor(first) if served and extension.load("triton") else None


def _use_channels_last(
    memory_format: str, planned: torch.device | None, has_kernels: bool, sites: list[Site]
) -> bool:
    """``auto`` is channels-last on the CPU, and on GPUs where tensor cores work on half precision
    or cvfast's kernels ask for it."""
    if memory_format != "auto":
        return memory_format == "channels_last"
    half = (torch.float16, torch.bfloat16)
    served = has_kernels and any(site.dtype in POINTWISE_DTYPES for site in sites)
    return served or all(
        (planned or site.device).type == "cpu" or site.dtype in half for site in sites
    )


def _candidates(
    site: Site, planned: torch.device | None, options: Options, channels_last: bool
) -> tuple[list[_Call], tuple[str, str]]:
    """Kernel calls that can compute the site, the preferred first; if there are none, why."""
    device, wanted = planned or site.device, options.backend
    calls: list[_Call] = []
    refusals: list[tuple[str, str]] = []

    def offer(call: Callable[[], _Call], refusal: tuple[str, str] | None) -> None:
        if refusal is None:
            calls.append(call())
        else:
            refusals.append(refusal)

    if (kernel := _own_kernel(site, options)) is not None:
        wished = backends.preferred(device) if wanted == "auto" else (wanted,)
        own = [backend for backend in wished if backend in kernel.backends]
        if wanted == "auto" and "cuda" in own and not _has_tile_kernel(site):
            # Triton's kernel is the same for every geometry, CUDA's general one an output a thread.
            own.sort(key="triton".__ne__)
        for backend in own:
            refusal = _own_unsupported(site, kernel, backend, planned, channels_last)
            offer(partial(kernel.call, site, backend), refusal)
        if not calls and any(code == "no_extension" for code, _ in refusals):
            for backend in own:
                extension.warn_missing(backend)
    if wanted == "onednn" or (wanted == "auto" and device.type == "cpu"):
        offer(partial(_onednn_call, site), _onednn_unsupported(site, device, channels_last))
    # Without a kernel a site still gains from folding; with nothing to fold it stays as it was.
    folds = wanted == "auto" and not calls and site.batch_norm is not None
    # On a GPU that is cuDNN with what follows in passes: what a kernel must beat.
    rivals = wanted == "auto" and options.select == "measure" and device.type == "cuda"
    if wanted == "reference" or folds or (rivals and calls):
        calls.append(_torch_call(site, channels_last and device.type == "cuda"))
    nobody = ("no_backend", f"backend {wanted!r} has no kernel for {site.pattern}")
    return calls, refusals[0] if refusals else nobody


def _has_tile_kernel(site: Site) -> bool:
    """Whether the CUDA kernel for the site's geometry is one that works in tiles."""
    n, c, h, w = shape_hint(site.source)
    geometry = site.geometry
    return tileable(
        Problem(
            n, c, h, w, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation,
            multiplier=shape_hint(site.conv)[1] // c,
        )
    )  # fmt: skip


class _Kernel(NamedTuple):
    """One of cvfast's own kernels."""

    name: str
    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    call: Callable[[Site, str], _Call]


def _own_kernel(site: Site, options: Options) -> _Kernel | None:
    """The kernel of cvfast's own for the site: with ``auto`` only where it beats oneDNN."""
    if site.is_depthwise:
        backends_ = operators.backends_of("depthwise")
        return _Kernel("depthwise", backends_, DEPTHWISE_DTYPES, _depthwise_call)
    if site.is_pointwise:
        backends_ = operators.backends_of("pointwise")
        return _Kernel("pointwise", backends_, POINTWISE_DTYPES, _pointwise_call)
    dense = site.geometry.groups == 1 and site.geometry.kernel != (1, 1)
    if dense:
        call = partial(_conv_call, options.winograd)
        return _Kernel("convolution", operators.backends_of("conv"), CONV_DTYPES, call)
    return None


def _conv_algorithm(site: Site, winograd: str) -> str:
    if winograd == "off":
        return "direct"
    geometry = site.geometry
    return choose_algorithm(
        shape_hint(site.source), shape_hint(site.weight), stride=geometry.stride,
        padding=geometry.padding, dilation=geometry.dilation, allow_f4=winograd == "F4",
        allow_bf16=site.batch_norm is not None, dtype=site.dtype,
    )  # fmt: skip


def _onednn_unsupported(
    site: Site, device: torch.device, channels_last: bool
) -> tuple[str, str] | None:
    if not channels_last:
        return ("layout", "oneDNN's packed convolutions need channels-last memory")
    unsupported = onednn_unsupported(site.dtype, device)
    return None if unsupported is None else ("unsupported_dtype", unsupported)


def _own_unsupported(
    site: Site, kernel: _Kernel, backend: str, planned: torch.device | None, channels_last: bool
) -> tuple[str, str] | None:
    if planned is not None and backend not in backends.preferred(planned):
        return ("no_backend", f"the {backend} kernel does not run on a GPU")
    if not channels_last:
        return ("layout", f"the {kernel.name} kernel needs channels-last memory")
    if site.dtype not in kernel.dtypes:
        return ("unsupported_dtype", f"the {kernel.name} kernel does not take {site.dtype}")
    if planned is not None:
        return None
    if (reason := backends.wrong_device(backend, site.device)) is not None:
        return ("no_backend", reason.text)
    status = extension.load(backend)
    return None if status else ("no_extension", str(status))


def _own_call(
    site: Site,
    backend: str,
    op: Any,
    activations: Sequence[str],
    pack: Callable[[Tensor, Tensor | None], tuple[Any, ...]],
    arguments: Callable[[fx.Node, list[fx.Node], fx.Node | None, str], tuple[Any, ...]],
) -> _Call:
    """A call of one of cvfast's own kernels; an activation that it lacks follows as a pass.

    ``arguments`` orders what ``op`` takes: the image, packed weights, residual and activation.
    """
    activation = site.activation
    fused = activation.name in activations

    def emit(
        graph: fx.Graph, constants: list[fx.Node], x: fx.Node, residual: fx.Node | None
    ) -> fx.Node:
        name = activation.name if fused else "none"
        result = graph.call_function(op, arguments(x, constants, residual, name))
        if fused:
            return result
        return graph.call_function(activate_, (result, activation.name, activation.parameters))

    return _Call(
        backend, emit, pack, int(not fused), needs_channels_innermost=True,
        fold_dtype=torch.float32,
    )  # fmt: skip


def _depthwise_call(site: Site, backend: str) -> _Call:
    geometry = site.geometry
    multiplier = shape_hint(site.conv)[1] // geometry.groups

    def pack(weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        return (prepack_depthwise(weight, bias, multiplier=multiplier),)

    def arguments(
        x: fx.Node, packed: list[fx.Node], residual: fx.Node | None, activation: str
    ) -> Any:
        assert residual is None
        return (
            x, packed[0], list(geometry.kernel), list(geometry.stride), list(geometry.padding),
            list(geometry.dilation), activation,
        )  # fmt: skip

    op = operators.operator("depthwise", backend)
    return _own_call(site, backend, op, DEPTHWISE_ACTIVATIONS, pack, arguments)


def _pointwise_call(site: Site, backend: str) -> _Call:
    out_channels, stride = shape_hint(site.conv)[1], list(site.geometry.stride)

    def pack(weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        if backend == "cpu":
            return (prepack_pointwise(weight, bias, dtype=site.dtype),)
        return prepack_pointwise_gpu(weight, bias, site.dtype)

    def arguments(
        x: fx.Node, packed: list[fx.Node], residual: fx.Node | None, activation: str
    ) -> Any:
        prologue = (None, None, None)  # scale, shift, gate
        weights = _weights(packed, backend)
        return (x, *weights, out_channels, stride, *prologue, residual, activation)

    op = operators.operator("pointwise", backend)
    return _own_call(site, backend, op, POINTWISE_ACTIVATIONS, pack, arguments)


def _conv_call(winograd: str, site: Site, backend: str) -> _Call:
    geometry, out_channels = site.geometry, shape_hint(site.conv)[1]
    algorithm = _conv_algorithm(site, winograd)

    def pack(weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        if backend != "cpu":
            return prepack_conv_gpu(weight, bias, site.dtype)
        # A transform would spread a NaN among the weights over its kernel.
        finite = algorithm == "direct" or bool(weight.isfinite().all())
        chosen = algorithm if finite else "direct"
        return (prepack_conv(weight, bias, algorithm=chosen, dtype=site.dtype),)

    def arguments(
        x: fx.Node, packed: list[fx.Node], residual: fx.Node | None, activation: str
    ) -> Any:
        x2 = None
        return (
            x, *_weights(packed, backend), residual, x2, list(geometry.kernel), out_channels,
            list(geometry.stride), list(geometry.padding), list(geometry.dilation), activation,
        )  # fmt: skip

    op = operators.operator("conv", backend)
    return _own_call(site, backend, op, CONV_ACTIVATIONS, pack, arguments)


def _weights(packed: list[fx.Node], backend: str) -> list[fx.Node]:
    """A matrix kernel's packed operands: one on the CPU, weight and bias on a GPU."""
    return packed[:1] if backend == "cpu" else packed


def _onednn_call(site: Site) -> _Call:
    geometry, activation = site.geometry, site.activation
    x_shape = shape_hint(site.source)

    def pack(weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        packed = OneDnnWeight(
            weight, x_shape, stride=geometry.stride, padding=geometry.padding,
            dilation=geometry.dilation, groups=geometry.groups,
        )  # fmt: skip
        return packed, bias

    def emit(
        graph: fx.Graph, constants: list[fx.Node], x: fx.Node, residual: fx.Node | None
    ) -> fx.Node:
        arguments = (x, *constants, residual, activation.name, activation.parameters)
        return graph.call_function(conv_onednn, arguments)

    fused = fuses_activation(activation.name, site.residual is not None)
    return _Call("onednn", emit, pack, passes=int(not fused))


def _torch_call(site: Site, channels_last: bool) -> _Call:
    geometry, activation = site.geometry, site.activation

    def pack(weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        if channels_last:  # cuDNN would convert it on each call
            weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, bias

    def emit(
        graph: fx.Graph, constants: list[fx.Node], x: fx.Node, residual: fx.Node | None
    ) -> fx.Node:
        arguments = (
            x, *constants, residual, list(geometry.stride), list(geometry.padding),
            list(geometry.dilation), geometry.groups, activation.name, activation.parameters,
        )  # fmt: skip
        return graph.call_function(conv_torch, arguments)

    passes = (site.residual is not None) + bool(activation)
    return _Call("reference", emit, pack, passes)
