"""Layers as CUDA graphs: a CPU starts the 20,000 kernels of a step more slowly than a GPU runs them.

    model.recompute_layers(0)           # all that the layers compute is kept for the backward pass
    replay_loops(model)                 # all layers in all loops as two graphs, forward and backward

    model.recompute_layers(48)          # 4-bit weights, lora.fuse(model, "nf4")
    replay_layers(model, tokens=2048)   # of a batch, at most

A layer that is recomputed takes about 140 kernels: forward, forward again, backward. There one layer is captured as two
graphs, the forward pass, and the forward pass again with the backward pass, and serves them all: before each replay
the layer's frozen weights and copies of the adapters are copied to where the graphs read them. In 4 bits those of
Ouro-2.6B have 26 MB, which takes a hundredth of the layer's own time. Both graphs draw the same dropout: the backward
pass sets the generator of random numbers back to where it was when the forward pass was replayed.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

from ouro.model.lora import Group
from ouro.model.modeling_ouro import OuroRMSNorm

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DOCUMENTS = 16  # that the graphs of a layer have room for in a packed row; a batch with more is computed without graphs


def groups_of(layer: nn.Module) -> list[Group]:
    return [module for module in layer.modules() if isinstance(module, Group)]


def adapters(layer: nn.Module) -> list[nn.Parameter]:
    return [p for group in groups_of(layer) for p in group.parameters_of()]


@contextmanager
def standing_in(groups: list[Group], parameters: list[nn.Parameter]):
    """The groups' adapters are these parameters, in the order of `adapters`."""
    places = [place for group in groups for place in group.adapters()]
    own = [place.weight for place in places]
    for place, parameter in zip(places, parameters, strict=True):
        place.weight = parameter
    try:
        yield
    finally:
        for place, parameter in zip(places, own, strict=True):
            place.weight = parameter


def differing(layer: nn.Module) -> list[Tensor]:
    """All tensors in which a layer differs from others: norms, frozen weights, copies of the adapters."""
    norms = [module.weight.detach() for module in layer.modules() if isinstance(module, OuroRMSNorm)]
    return norms + [tensor for group in groups_of(layer) for tensor in group.frozen()]


def copies(to: nn.Module, layer: nn.Module) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Lists for `_foreach_copy_` that make `to` the layer: of one dtype each, and as 8-byte numbers where possible,
    which are copied fastest."""
    lists: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for pair in zip(differing(to), differing(layer), strict=True):
        mine, theirs = (tensor.view(-1) for tensor in pair)
        if all(x.numel() * x.itemsize % 8 == 0 and x.data_ptr() % 8 == 0 for x in pair):
            mine, theirs = mine.view(torch.int64), theirs.view(torch.int64)
        destinations, sources = lists.setdefault(mine.dtype, ([], []))
        destinations.append(mine)
        sources.append(theirs)
    return list(lists.values())


def generator(x: Tensor) -> torch.Generator | None:
    return torch.cuda.default_generators[x.device.index] if x.is_cuda else None


class Memory:
    """The GPU memory in which a model's graphs compute, one after the other.

    kept: its bytes, which torch does not count as allocated between replays. turn: number of forward passes replayed.
    """

    def __init__(self, x: Tensor):
        self.pool = torch.cuda.graph_pool_handle() if x.is_cuda else None
        # By default a process captures all graphs on one stream, of the GPU that was current at its first capture.
        self.stream = torch.cuda.Stream(x.device) if x.is_cuda else None
        self.kept = self.turn = 0

    def capture(self, work: Callable[[], None], warm_up: Callable[[], None], x: Tensor) -> Callable[[], None]:
        """`work` as a graph on the GPU of x; on a CPU it stays what it is. Draws no random numbers.

        warm_up: is called before, so that all is compiled and libraries have chosen their kernels.
        """
        if not x.is_cuda:
            return work
        offset = generator(x).get_offset()
        with torch.cuda.device_of(x):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(2):
                    warm_up()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # The mode lets other threads, NCCL's and the data loader's, use the GPU during the capture.
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    before = torch.cuda.memory_reserved()
                    work()
                    self.kept += torch.cuda.memory_reserved() - before
            except RuntimeError as error:
                # Where the capture failed for want of memory, ending it fails too, and hides why.
                if isinstance(error.__context__, torch.OutOfMemoryError):
                    raise error.__context__ from None
                raise
        generator(x).set_offset(offset)
        return graph.replay


def peak_memory(model: nn.Module) -> int:
    """Bytes of this process's GPU in use at the peak, with the memory of the model's graphs."""
    memory = getattr(model, "graph_memory", None)
    return torch.cuda.max_memory_allocated() + (memory.kept if memory else 0)


class Positions:
    """Where graphs read a batch's rotations and the bounds of its documents, at most so many; 0: each row is one."""

    def __init__(self, cos: Tensor, tokens: int, documents: int):
        self.cos, self.sin = (torch.zeros_like(cos) for _ in range(2))
        self.documents = None
        if documents:
            self.documents = torch.full((documents + 1,), tokens, dtype=torch.int32, device=cos.device)
            self.documents[0] = 0
        self.loaded: tuple | None = None

    def load(self, cos: Tensor, sin: Tensor, documents: Tensor | None) -> None:
        if self.loaded is None or self.loaded[0] is not cos or self.loaded[1] is not documents:
            torch._foreach_copy_([self.cos, self.sin], [cos, sin])
            if documents is not None:  # the places left over hold empty documents at the end
                self.documents[: len(documents)], self.documents[len(documents) :] = documents, documents[-1]
            self.loaded = cos, documents

    def arguments(self) -> tuple:
        """What a layer takes after its state: cos, sin, mask, causal, documents."""
        return self.cos, self.sin, None, self.documents is None, self.documents


class CapturedLayer:
    """A layer's two graphs for states of one shape, (batch, seq, hidden). On a CPU the same work without graphs.

    room: where the graphs of all shapes read and write: the state, its gradient, the adapters' gradients.
    """

    def __init__(
        self, layer: nn.Module, room: dict[str, Tensor], memory: Memory, batch: int, seq: int, cos: Tensor, packed: bool
    ):
        self.layer, self.parameters = layer, adapters(layer)
        shape = batch, seq, room["state"].shape[-1]
        self.state, self.grad = (room[name][: batch * seq].view(shape) for name in ("state", "grad"))
        self.flat, self.generator = room["adapters"], generator(cos)
        self.positions = Positions(cos, batch * seq, batch * DOCUMENTS if packed else 0)
        self.forward, self.backward = (
            memory.capture(work, partial(self.warm_up, work), cos) for work in (self.run_forward, self.run_backward)
        )

    def warm_up(self, work: Callable[[], None]) -> None:
        self.state.zero_()
        work()

    def run(self) -> tuple[Tensor, Tensor]:
        x = self.state.detach().requires_grad_()
        with torch.enable_grad():
            return x, self.layer(x, *self.positions.arguments())

    def run_forward(self) -> None:
        # `run` records a backward pass that is never made: so this graph runs the same kernels as `run_backward`'s, and
        # draws the same dropout.
        self.state.copy_(self.run()[1].detach())

    def run_backward(self) -> None:
        x, y = self.run()
        dx, *grads = torch.autograd.grad(y, (x, *self.parameters), self.grad)
        self.grad.copy_(dx)
        self.flat.copy_(torch.cat([g.flatten() for g in grads]))

    def load(self, weights: list, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None) -> None:
        for mine, theirs in weights:
            torch._foreach_copy_(mine, theirs)
        self.state.copy_(x)
        self.positions.load(cos, sin, documents)


class _ReplayedLayer(torch.autograd.Function):
    """layer(x), of which only x is kept for the backward pass; the parameters are there to be given their gradients."""

    @staticmethod
    def forward(ctx, captured: CapturedLayer, weights: list, x, cos, sin, documents, *parameters):
        ctx.captured, ctx.weights, ctx.sizes = captured, weights, [p.shape for p in parameters]
        ctx.offset = captured.generator.get_offset() if captured.generator else None
        ctx.save_for_backward(x, cos, sin, documents)
        captured.load(weights, x, cos, sin, documents)
        captured.forward()
        return captured.state.clone()

    @staticmethod
    def backward(ctx, dy):
        captured = ctx.captured
        x, cos, sin, documents = ctx.saved_tensors
        captured.load(ctx.weights, x, cos, sin, documents)
        captured.grad.copy_(dy)
        if captured.generator:
            now = captured.generator.get_offset()
            captured.generator.set_offset(ctx.offset)
        captured.backward()
        if captured.generator:
            captured.generator.set_offset(now)
        # Clones, for autograd adds up the loops' gradients after the next replay has written over the graphs' own.
        dx, flat = captured.grad.clone(), captured.flat.clone()
        grads = flat.split([size.numel() for size in ctx.sizes])
        return None, None, dx, None, None, None, *(g.view(size) for g, size in zip(grads, ctx.sizes, strict=True))


def replay_layers(model: PeftModel, tokens: int, **compiling) -> None:
    """Makes the layers that are recomputed (`recompute_layers`) replay graphs, in place.

    For rows of one length: each other shape of a batch takes a pair of graphs more. Batches with a mask, and larger
    ones, are computed without graphs.

    tokens: of the largest batch, padding included. compiling: options of `nn.Module.compile`; none: not compiled.
    """
    layers = [layer for layer in model.get_base_model().model.layers if layer.gradient_checkpointing]
    if not layers:
        return
    layer = copy.deepcopy(layers[0]).train()
    layer.gradient_checkpointing = False
    for group in groups_of(layer):
        for projection in group.projections:  # emptied: the graphs read what the group keeps
            weight = projection.get_base_layer().weight
            weight.data = weight.data.new_empty(0)
    if compiling:
        layer.compile(**compiling)
    norm, parameters = layer.input_layernorm.weight, adapters(layer)
    new = {"device": norm.device}
    dtype = groups_of(layer)[0].copies()[0].dtype
    room = {name: torch.zeros(tokens, len(norm), dtype=dtype, **new) for name in ("state", "grad")}
    room["adapters"] = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, **new)
    model.get_base_model().graph_memory = memory = Memory(norm)
    captured: dict[tuple, CapturedLayer] = {}

    def run(weights, parameters, function, x, cos, sin, mask, causal, documents):
        batch, seq, _ = x.shape
        packed = documents is not None
        if mask is not None or batch * seq > tokens or (packed and len(documents) > batch * DOCUMENTS + 1):
            return checkpoint(function, x, cos, sin, mask, causal, documents, use_reentrant=False)
        key = batch, seq, len(cos), packed
        if key not in captured:
            captured[key] = CapturedLayer(layer, room, memory, batch, seq, cos, packed)
        return _ReplayedLayer.apply(captured[key], weights, x, cos, sin, documents, *parameters)

    for each in layers:
        each._gradient_checkpointing_func = partial(run, copies(layer, each), adapters(each))


class CapturedLoops:
    """All layers in all loops, forward and backward, as two graphs for states of one shape, (batch, seq, hidden). What
    the first keeps for the second stays where it is between replays. On a CPU the same work without graphs."""

    def __init__(self, decoder: nn.Module, memory: Memory, state: Tensor, cos: Tensor, loops: int, documents: int):
        self.decoder, self.groups, self.loops = decoder, groups_of(decoder), loops
        # Stand-ins: DDP waits for the adapters' own gradients on another stream, which a capture may not touch.
        self.parameters = [nn.Parameter(p.detach()) for p in adapters(decoder)]
        self.positions = Positions(cos, state.shape[0] * state.shape[1], documents)
        self.state = torch.zeros_like(state)
        self.grads = [torch.zeros_like(state) for _ in range(loops)]
        sizes = [p.numel() for p in self.parameters]
        self.flat = torch.zeros(sum(sizes), dtype=self.parameters[0].dtype, device=state.device)
        self.states: tuple[Tensor, ...] = ()
        self.forward = memory.capture(self.run_forward, self.warm_up, state)
        self.backward = memory.capture(self.run_backward, lambda: None, state)  # `warm_up` has run its kernels, too
        if state.is_cuda:
            torch.cuda.reset_peak_memory_stats(state.device)  # `memory.kept` counts what the captures took

    def warm_up(self) -> None:
        with standing_in(self.groups, self.parameters), torch.enable_grad():
            x = y = self.state.detach().requires_grad_()
            for layer in self.decoder.layers[:2]:  # the others run the same kernels
                y = layer(y, *self.positions.arguments())
            y = self.decoder.norm(y)
        torch.autograd.grad(y, (x, *self.parameters), self.grads[0], allow_unused=True)

    def run_forward(self) -> None:
        with standing_in(self.groups, self.parameters), torch.enable_grad():
            # The first state wants a gradient, as those between layers do: else the first layer is compiled by itself.
            x = self.state.detach().requires_grad_()
            self.states = type(self.decoder).run_loops(self.decoder, x, *self.positions.arguments(), self.loops)

    def run_backward(self) -> None:
        grads = torch.autograd.grad(self.states, self.parameters, self.grads)
        self.states = tuple(state.detach() for state in self.states)
        self.flat.copy_(torch.cat([g.flatten() for g in grads]))


class _ReplayedLoops(torch.autograd.Function):
    """decoder.run_loops(x); the parameters are there to be given their gradients."""

    @staticmethod
    def forward(ctx, captured: CapturedLoops, memory: Memory, x, cos, sin, documents, *parameters):
        memory.turn += 1
        ctx.captured, ctx.memory, ctx.turn, ctx.sizes = captured, memory, memory.turn, [p.shape for p in parameters]
        captured.positions.load(cos, sin, documents)
        captured.state.copy_(x)
        captured.forward()
        return tuple(state.detach().clone() for state in captured.states)

    @staticmethod
    def backward(ctx, *dys):
        captured = ctx.captured
        if ctx.turn != ctx.memory.turn:
            raise RuntimeError("another forward pass has been replayed since this one, over what it had kept")
        torch._foreach_copy_(captured.grads, dys)
        captured.backward()
        grads = captured.flat.clone().split([size.numel() for size in ctx.sizes])
        return *[None] * 6, *(g.view(size) for g, size in zip(grads, ctx.sizes, strict=True))


def replay_loops(model: PeftModel) -> None:
    """Makes training passes of a model none of whose layers is recomputed replay graphs, in place.

    For rows of one length: each other shape of a batch takes a pair of graphs more, in the same memory. The backward
    pass of a batch must come before the next forward pass, which raises RuntimeError otherwise.
    """
    decoder = model.get_base_model().model
    run_loops, captured, parameters = decoder.run_loops, {}, adapters(decoder)
    model.get_base_model().graph_memory = memory = Memory(parameters[0])

    def run(x, cos, sin, mask, causal, documents, loops: int, past_key_values=None) -> tuple[Tensor, ...]:
        training = decoder.training and torch.is_grad_enabled()
        if not training or mask is not None or past_key_values is not None:
            return run_loops(x, cos, sin, mask, causal, documents, loops, past_key_values)
        room = 0  # for so many documents: DOCUMENTS a row, or twice, four times, ... as many
        if documents is not None:
            room = len(x) * DOCUMENTS
            while room + 1 < len(documents):
                room *= 2
        key = x.shape, len(cos), loops, room
        if key not in captured:
            captured[key] = CapturedLoops(decoder, memory, x.detach(), cos, loops, room)
        return _ReplayedLoops.apply(captured[key], memory, x, cos, sin, documents, *parameters)

    decoder.run_loops = run
