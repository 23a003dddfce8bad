"""How a training pass runs the layers: which are computed twice to save memory, where their inputs are kept until the
backward pass, and CUDA graphs of all of them.

    run_by_plan(model, plan, largest=16384, last=True, graphs=True)      # plan(tokens) -> Plan of a pass of that size

A layer keeps 75 KB a token for the backward pass, and there are 192 layer calls in a pass of four loops. So a `Plan`
says of a pass how many of its calls, counted from the first, keep only their input, a *state* of 4 KB a token, and are
computed again in the backward pass; and how many of those states, again the first, are moved to the CPU's memory until
then. They are copied while the layers compute.

A CPU starts the thousands of kernels of a pass more slowly than a GPU runs them. So for each shape of pass all layers
in all loops are captured as two CUDA graphs, forward and backward. The graphs of all shapes use the same memory, since
they run one after the other.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext

from ouro.data.batches import room
from ouro.model.cost import Plan
from ouro.model.lora import Group

import torch
from peft import PeftModel
from torch import Tensor, nn


def groups_of(layer: nn.Module) -> list[Group]:
    return [module for module in layer.modules() if isinstance(module, Group)]


def adapters(layer: nn.Module) -> list[nn.Parameter]:
    """PEFT's parameters A and B in a layer, or in all layers of a decoder, group by group."""
    return [p for group in groups_of(layer) for p in group.adapters()]


@contextmanager
def standing_in(groups: list[Group], parameters: list[nn.Parameter]):
    """Inside the `with` block these parameters, in the order of `adapters`, stand in for those of the groups."""
    linears = [linear for group in groups for linear in group.linears()]
    own = [linear.weight for linear in linears]
    for linear, parameter in zip(linears, parameters, strict=True):
        linear.weight = parameter
    try:
        yield
    finally:
        for linear, parameter in zip(linears, own, strict=True):
            linear.weight = parameter


class Waiting:
    """A place in the CPU's pinned memory for the states that wait there from the forward to the backward pass.

    states: how many; numbers: in the largest of them; like: a tensor of their dtype and device. Copies run on a stream
    of their own, while the layers compute: a state is put into one of two buffers on the GPU and copied to the CPU from
    there, and fetched the other way. State n uses buffer n % 2."""

    def __init__(self, states: int, numbers: int, like: Tensor):
        pinned = {"dtype": like.dtype, "pin_memory": like.is_cuda}
        self.far = [torch.empty(numbers, **pinned) for _ in range(states)]
        self.near = [like.new_empty(numbers) for _ in range(2)]
        self.stream = torch.cuda.Stream(like.device) if like.is_cuda else None
        self.copied: list[torch.cuda.Event | None] = [None, None]  # for each buffer: the end of its last copy

    def copy(self, to: Tensor, source: Tensor, buffer: int) -> None:
        """Starts a copy, which waits for the work that the GPU was given before, and not the later work for it."""
        if not self.stream:
            to.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            self.copied[buffer] = self.stream.record_event()

    def wait(self, buffer: int) -> None:
        """Lets the GPU's next work wait until the last copy of this buffer is done."""
        if self.copied[buffer]:
            torch.cuda.current_stream().wait_event(self.copied[buffer])
            self.copied[buffer] = None

    def put(self, number: int, x: Tensor) -> None:
        """Starts to copy state `number` to the CPU's memory."""
        at = number % 2
        self.wait(at)
        near = self.near[at][: x.numel()].view_as(x)
        near.copy_(x)
        self.copy(self.far[number][: x.numel()].view_as(x), near, at)

    def settle(self) -> None:
        """Lets the GPU's next work wait until all copies are done."""
        self.wait(0)
        self.wait(1)

    def fetch(self, number: int, shape: torch.Size) -> Tensor:
        """Starts to copy state `number` back; the buffer into which it is copied."""
        near = self.near[number % 2][: shape.numel()].view(shape)
        self.copy(near, self.far[number][: shape.numel()].view(shape), number % 2)
        return near

    def get(self, number: int, last: int, shape: torch.Size) -> Tensor:
        """State `number`, back on the GPU. To be called for `last` first and downwards from it, as the backward pass
        goes: each call starts to fetch the state that the next one asks for."""
        if number == last:
            self.fetch(number, shape)
        self.wait(number % 2)
        if number:
            self.fetch(number - 1, shape)
        return self.near[number % 2][: shape.numel()].view(shape)


class _Recomputed(torch.autograd.Function):
    """layer(x, *arguments), of which only x is kept for the backward pass, on the GPU or in the CPU's memory.

    parameters: the layer's, which also stand as arguments of their own, because autograd gives gradients to arguments
    alone. wait: None, or (the `Waiting`, the number of this state, the number of the last state that waits). Unlike
    torch's checkpoint this stores no state of a random number generator, and so can be captured in a graph."""

    @staticmethod
    def forward(ctx, layer, arguments, parameters, wait, x, *_):
        with torch.enable_grad():  # the same kernels as in the backward pass, and so the same bits
            y = layer(x.detach().requires_grad_(), *arguments).detach()
        ctx.layer, ctx.arguments, ctx.parameters, ctx.wait, ctx.shape = layer, arguments, parameters, wait, x.shape
        if wait:
            waiting, number, _ = wait
            waiting.put(number, x)
        else:
            ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, dy):
        if ctx.wait:
            waiting, number, last = ctx.wait
            x = waiting.get(number, last, ctx.shape)
        else:
            (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.layer(x, *ctx.arguments)
        dx, *grads = torch.autograd.grad(y, (x, *ctx.parameters), dy)
        return None, None, None, None, dx, *grads


def loops_by_plan(decoder, x, cos, sin, causal, documents, noise, loops: int, plan: Plan, waiting: Waiting | None):
    """The states that `decoder.run_loops` gives, with layer calls computed twice, and states moved to the CPU's memory,
    as the plan says."""
    states, call, own = [], 0, [adapters(layer) for layer in decoder.layers]
    for loop in range(loops):
        here = None if noise is None else noise + loop
        for layer, parameters in zip(decoder.layers, own, strict=True):
            arguments = cos, sin, None, causal, documents, None, None, here
            if call < plan.recomputed:
                wait = (waiting, call, plan.waiting - 1) if call < plan.waiting else None
                x = _Recomputed.apply(layer, arguments, parameters, wait, x, *parameters)
            else:
                x = layer(x, *arguments)
            call += 1
        x = decoder.norm(x)
        states.append(x)
    if waiting:
        waiting.settle()
    return tuple(states)


class GraphMemory:
    """The GPU memory that all graphs of a model share, and the tensors that they read their input from and write their
    output to.

    kept: bytes that the graphs need inside, which torch does not count as allocated while none of them runs. turn: how
    many forward passes were replayed."""

    def __init__(self, like: Tensor, largest: int, head: int, states: int, parameters: list[nn.Parameter]):
        """like: a tensor (1, hidden) of the states' dtype; largest: tokens of the largest pass; head: size of an
        attention head; states: how many loops' states a pass gives back, and is given gradients of; parameters: the
        adapters', in the order of `adapters`."""
        self.pool = torch.cuda.graph_pool_handle() if like.is_cuda else None
        # By default a process captures all graphs on one stream, of the GPU that was current at its first capture.
        self.stream = torch.cuda.Stream(like.device) if like.is_cuda else None
        self.kept = self.turn = 0
        self.state = like.new_zeros(largest, like.shape[-1])
        self.grads = [torch.zeros_like(self.state) for _ in range(states)]
        self.outs = [torch.zeros_like(self.state) for _ in range(states)]
        self.places = [like.new_zeros(largest, 1, head) for _ in range(2)]  # cos and sin
        self.noise = like.new_zeros(largest, dtype=torch.int32)
        # The graphs compute with stand-ins for the adapters' parameters (`standing_in`): to the real ones DDP has tied
        # work on another stream, which a capture may not touch.
        self.parameters = [nn.Parameter(p.detach()) for p in parameters]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=like.device)

    def capture(self, work: Callable[[], None], x: Tensor) -> Callable[[], None]:
        """A function that replays `work` as a graph on the GPU of x; `work` itself on a CPU. The work must draw no
        random numbers, and all of it must be compiled already."""
        if not x.is_cuda:
            return work
        with torch.cuda.device_of(x):
            graph = torch.cuda.CUDAGraph()
            try:
                # The mode lets other threads, NCCL's and the data loader's, use the GPU during the capture.
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    before = torch.cuda.memory_reserved()
                    work()
                    self.kept += torch.cuda.memory_reserved() - before
            except RuntimeError as error:
                # A capture that ran out of memory fails a second time as it is ended, and that error hides the first.
                if isinstance(error.__context__, torch.OutOfMemoryError):
                    raise error.__context__ from None
                raise
        return graph.replay


def peak_memory(model: nn.Module) -> int:
    """Bytes of this process's GPU that were in use at the peak, the memory of the model's graphs included."""
    memory = getattr(model, "graph_memory", None)
    return torch.cuda.max_memory_allocated() + (memory.kept if memory else 0)


class Captured:
    """The two graphs of one shape of pass, (batch, seq, hidden): all layers in all loops, forward and backward. What
    the forward graph keeps for the backward one stays in place between their replays. On a CPU the same work is done
    without graphs.

    documents: places for documents, see `room`; 0 where no rows stand end to end. last: only the last loop's state is
    given back."""

    def __init__(
        self, decoder, memory: GraphMemory, x, cos, documents: int, noise, loops: int, last: bool, plan, waiting
    ):
        self.decoder, self.memory, self.loops, self.last, self.plan = decoder, memory, loops, last, plan
        self.waiting, self.groups, tokens = waiting, groups_of(decoder), x.shape[0] * x.shape[1]
        buffers = memory.state, *memory.grads, *memory.outs
        self.state, *both = (buffer[:tokens].view(x.shape) for buffer in buffers)
        self.grads, self.outs = both[: len(memory.grads)], both[len(memory.grads) :]
        self.cos, self.sin = (place[: cos.shape[0] * cos.shape[1]].view(cos.shape) for place in memory.places)
        self.noise = noise if noise is None else memory.noise[:tokens].view(noise.shape)
        self.documents = None
        if documents:
            self.documents = torch.full((documents + 1,), tokens, dtype=torch.int32, device=x.device)
            self.documents[0] = 0
        self.states: tuple[Tensor, ...] = ()
        self.forward = self.backward = None
        self.warm_up()

    def warm_up(self) -> None:
        """Runs a layer forward and backward on the stream of the captures, so that all is compiled, and libraries have
        chosen their kernels, before the first capture."""
        arguments = self.cos, self.sin, None, self.documents is None, self.documents, None, None, self.noise
        beside = torch.cuda.stream(self.memory.stream) if self.memory.stream else nullcontext()
        with torch.cuda.device_of(self.state), beside, standing_in(self.groups, self.memory.parameters):
            with torch.enable_grad():
                x = self.state.detach().requires_grad_()
                y = self.decoder.norm(self.decoder.layers[0](x, *arguments))  # the others run the same kernels
            torch.autograd.grad(y, (x, *self.memory.parameters), self.grads[0], allow_unused=True)

    def capture(self) -> "Captured":
        """Captures the graphs, unless that was done before."""
        if not self.forward:
            self.forward = self.memory.capture(self.run_forward, self.state)
            self.backward = self.memory.capture(self.run_backward, self.state)
            if self.state.is_cuda:
                self.states = ()
                torch.cuda.reset_peak_memory_stats(self.state.device)  # `memory.kept` counts what the captures took
        return self

    def run_forward(self) -> None:
        with standing_in(self.groups, self.memory.parameters), torch.enable_grad():
            # The first layer's input asks for a gradient as the other layers' do: else it would be compiled by itself.
            x, causal = self.state.detach().requires_grad_(), self.documents is None
            places = self.cos, self.sin, causal, self.documents, self.noise
            states = loops_by_plan(self.decoder, x, *places, self.loops, self.plan, self.waiting)
            self.states = states[-1:] if self.last else states
            # Copied out of the graphs' shared memory, where they would take room from the other shapes' graphs.
            torch._foreach_copy_(self.outs, [state.detach() for state in self.states])

    def run_backward(self) -> None:
        with standing_in(self.groups, self.memory.parameters):
            grads = torch.autograd.grad(self.states, self.memory.parameters, self.grads)
        self.memory.flat.copy_(torch.cat([g.flatten() for g in grads]))

    def load(self, x, cos, sin, documents: Tensor | None, noise: Tensor | None) -> None:
        self.state.copy_(x)
        torch._foreach_copy_([self.cos, self.sin], [cos, sin])
        if documents is not None:  # unused places are empty documents at the end
            self.documents[: len(documents)], self.documents[len(documents) :] = documents, documents[-1]
        if noise is not None:
            self.noise.copy_(noise)


class _Replayed(torch.autograd.Function):
    """The states of decoder.run_loops(x), by replaying the graphs. The next forward pass overwrites them. parameters:
    the adapters', to which the backward pass gives gradients."""

    @staticmethod
    def forward(ctx, captured: Captured, x, cos, sin, documents, noise, *parameters):
        memory = captured.memory
        memory.turn += 1
        ctx.captured, ctx.turn, ctx.sizes = captured, memory.turn, [p.shape for p in parameters]
        captured.load(x, cos, sin, documents, noise)
        captured.forward()
        return tuple(out.detach() for out in captured.outs)

    @staticmethod
    def backward(ctx, *dys):
        captured, memory = ctx.captured, ctx.captured.memory
        if ctx.turn != memory.turn:
            raise RuntimeError("another forward pass ran before this one's backward pass, and overwrote its states")
        torch._foreach_copy_(captured.grads, dys)
        captured.backward()
        grads = memory.flat.clone().split([size.numel() for size in ctx.sizes])
        return *[None] * 6, *(g.view(size) for g, size in zip(grads, ctx.sizes, strict=True))


def run_by_plan(model: PeftModel, plan: Callable[[int], Plan], largest: int, last: bool, graphs: bool) -> None:
    """Replaces `run_loops` of a fused model, so that its training passes run by their plans. Passes in evaluation, with
    a mask or with a cache run as before.

    plan: the plan of a pass of so many tokens, padding included; largest: the most tokens that a pass has. last: only
    the last loop's state is given back, for a loss that reads no other. graphs: each shape of pass is captured as a
    pair of graphs. The backward pass of a batch must then come before the next forward pass; RuntimeError otherwise."""
    decoder = model.get_base_model().model
    run_loops, captured, parameters = decoder.run_loops, {}, adapters(decoder)
    like, loops = decoder.norm.weight.detach()[None], decoder.config.total_ut_steps
    waits = plan(largest).waiting
    waiting = Waiting(waits, largest * like.shape[-1], like) if waits else None
    if graphs:
        memory = GraphMemory(like, largest, decoder.config.head_dim, 1 if last else loops, parameters)
        model.get_base_model().graph_memory = memory

    def graphs_of(x, cos, documents: int, noise) -> Captured:
        """The graphs of this shape, warmed up where they are new. documents: in the pass; 0 where each row is one."""
        key = x.shape, len(cos), documents and room(documents)
        if key not in captured:
            planned = plan(x.shape[0] * x.shape[1])
            captured[key] = Captured(decoder, memory, x.detach(), cos, key[2], noise, loops, last, planned, waiting)
        return captured[key]

    def prepare(batch: int, width: int, documents: int, noise: bool) -> Captured:
        """The graphs of a shape of pass, not captured yet. All shapes are to be warmed up so before the first of them
        is captured, since no warm-up can use the memory that graphs have taken."""
        x = like.new_zeros(batch, width, like.shape[-1])
        cos, _ = decoder.rotations(torch.arange(width, device=x.device)[None], x.dtype)
        drawn = torch.zeros(batch, width, dtype=torch.int32, device=x.device) if noise else None
        return graphs_of(x, cos, documents, drawn)

    def run(x, cos, sin, mask, causal, documents, loops: int, past_key_values=None, noise=None) -> tuple[Tensor, ...]:
        training = decoder.training and torch.is_grad_enabled()
        if not training or mask is not None or past_key_values is not None:
            return run_loops(x, cos, sin, mask, causal, documents, loops, past_key_values, noise)
        if not graphs:
            planned = plan(x.shape[0] * x.shape[1])
            return loops_by_plan(decoder, x, cos, sin, causal, documents, noise, loops, planned, waiting)
        ours = graphs_of(x, cos, 0 if documents is None else len(documents) - 1, noise).capture()
        return _Replayed.apply(ours, x, cos, sin, documents, noise, *parameters)

    decoder.run_loops, decoder.prepare = run, prepare if graphs else None
