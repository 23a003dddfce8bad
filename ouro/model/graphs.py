"""How the layers of a training pass run: which are computed twice, where their states wait, and all as CUDA graphs.

    run_by_plan(model, plan, largest=16384, last=True, graphs=True)      # plan(tokens) -> Plan of a pass of that size

A layer keeps 75 KB a token for the backward pass, and there are 192 layer calls in a pass of four loops. By its plan
the first calls of a pass keep their input alone, a *state* of 4 KB a token, and are computed again in the backward
pass; of those the first ones' states wait in the CPU's memory, copied beside the computation.

A CPU starts the thousands of kernels of a pass more slowly than a GPU runs them. So for each shape of a pass all
layers in all loops are captured as two graphs, forward and backward; all graphs compute in one memory, one after the
other.
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
    return [p for group in groups_of(layer) for p in group.adapters()]


@contextmanager
def standing_in(groups: list[Group], parameters: list[nn.Parameter]):
    """The groups' adapters are these parameters, in the order of `adapters`."""
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
    """States in the CPU's pinned memory, each of so many numbers at most, copied on a stream of their own.

    Two buffers on the GPU stand between: a state is copied away from one, or fetched into it, while the layers compute.
    """

    def __init__(self, states: int, numbers: int, like: Tensor):
        pinned = {"dtype": like.dtype, "pin_memory": like.is_cuda}
        self.far = [torch.empty(numbers, **pinned) for _ in range(states)]
        self.near = [like.new_empty(numbers) for _ in range(2)]
        self.stream = torch.cuda.Stream(like.device) if like.is_cuda else None
        self.copied: list[torch.cuda.Event | None] = [None, None]  # of each buffer, when its last copy was done

    def copy(self, to: Tensor, source: Tensor, buffer: int) -> None:
        """After what the GPU has to do now, beside what it will have to do next."""
        if not self.stream:
            to.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            self.copied[buffer] = self.stream.record_event()

    def wait(self, buffer: int) -> None:
        if self.copied[buffer]:
            torch.cuda.current_stream().wait_event(self.copied[buffer])
            self.copied[buffer] = None

    def put(self, number: int, x: Tensor) -> None:
        at = number % 2
        self.wait(at)
        near = self.near[at][: x.numel()].view_as(x)
        near.copy_(x)
        self.copy(self.far[number][: x.numel()].view_as(x), near, at)

    def settle(self) -> None:
        """All copies are done before what follows."""
        self.wait(0)
        self.wait(1)

    def fetch(self, number: int, shape: torch.Size) -> Tensor:
        near = self.near[number % 2][: shape.numel()].view(shape)
        self.copy(near, self.far[number][: shape.numel()].view(shape), number % 2)
        return near

    def get(self, number: int, last: int, shape: torch.Size) -> Tensor:
        """State `number`; the one below it is on its way then. They are fetched from `last` downwards."""
        if number == last:
            self.fetch(number, shape)
        self.wait(number % 2)
        if number:
            self.fetch(number - 1, shape)
        return self.near[number % 2][: shape.numel()].view(shape)


class _Recomputed(torch.autograd.Function):
    """layer(x, *arguments), of which only x is kept for the backward pass, or waits on the CPU.

    The parameters are the layer's, here to be given their gradients. Unlike torch's checkpoint this stores no state of
    a random number generator, and so can be captured in a graph."""

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
    """`decoder.run_loops` by the plan."""
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
    """The GPU memory in which a model's graphs compute, one after the other, and what they read and write.

    kept: its bytes, which torch does not count as allocated between replays. turn: number of forward passes replayed.
    """

    def __init__(self, like: Tensor, largest: int, head: int, states: int, parameters: list[nn.Parameter]):
        """like: of the states' dtype and width, (1, hidden); largest: tokens of the largest pass; head: numbers of an
        attention head; states: of a pass whose gradients are given."""
        self.pool = torch.cuda.graph_pool_handle() if like.is_cuda else None
        # By default a process captures all graphs on one stream, of the GPU that was current at its first capture.
        self.stream = torch.cuda.Stream(like.device) if like.is_cuda else None
        self.kept = self.turn = 0
        self.state = like.new_zeros(largest, like.shape[-1])
        self.grads = [torch.zeros_like(self.state) for _ in range(states)]
        self.outs = [torch.zeros_like(self.state) for _ in range(states)]
        self.places = [like.new_zeros(largest, 1, head) for _ in range(2)]  # cos and sin
        self.noise = like.new_zeros(largest, dtype=torch.int32)
        # Stand-ins: DDP waits for the adapters' own gradients on another stream, which a capture may not touch.
        self.parameters = [nn.Parameter(p.detach()) for p in parameters]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=like.device)

    def capture(self, work: Callable[[], None], x: Tensor) -> Callable[[], None]:
        """`work` as a graph on the GPU of x; on a CPU it stays what it is. Nothing is drawn or compiled."""
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
                # Where the capture failed for want of memory, ending it fails too, and hides why.
                if isinstance(error.__context__, torch.OutOfMemoryError):
                    raise error.__context__ from None
                raise
        return graph.replay


def peak_memory(model: nn.Module) -> int:
    """Bytes of this process's GPU in use at the peak, with the memory of the model's graphs."""
    memory = getattr(model, "graph_memory", None)
    return torch.cuda.max_memory_allocated() + (memory.kept if memory else 0)


class Captured:
    """All layers in all loops, forward and backward, as two graphs for states of one shape, (batch, seq, hidden). What
    the first keeps for the second stays where it is between replays. On a CPU the same work without graphs."""

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
        """All is compiled, and libraries have chosen their kernels; on the stream of the captures."""
        arguments = self.cos, self.sin, None, self.documents is None, self.documents, None, None, self.noise
        beside = torch.cuda.stream(self.memory.stream) if self.memory.stream else nullcontext()
        with torch.cuda.device_of(self.state), beside, standing_in(self.groups, self.memory.parameters):
            with torch.enable_grad():
                x = self.state.detach().requires_grad_()
                y = self.decoder.norm(self.decoder.layers[0](x, *arguments))  # the others run the same kernels
            torch.autograd.grad(y, (x, *self.memory.parameters), self.grads[0], allow_unused=True)

    def capture(self) -> "Captured":
        """Captures the graphs, unless they are there."""
        if not self.forward:
            self.forward = self.memory.capture(self.run_forward, self.state)
            self.backward = self.memory.capture(self.run_backward, self.state)
            if self.state.is_cuda:
                self.states = ()
                torch.cuda.reset_peak_memory_stats(self.state.device)  # `memory.kept` counts what the captures took
        return self

    def run_forward(self) -> None:
        with standing_in(self.groups, self.memory.parameters), torch.enable_grad():
            # The first state wants a gradient, as those between layers do: else the first layer is compiled by itself.
            x, causal = self.state.detach().requires_grad_(), self.documents is None
            places = self.cos, self.sin, causal, self.documents, self.noise
            states = loops_by_plan(self.decoder, x, *places, self.loops, self.plan, self.waiting)
            self.states = states[-1:] if self.last else states
            # Not left in the graphs' memory: there it would take room from the passes of other shapes.
            torch._foreach_copy_(self.outs, [state.detach() for state in self.states])

    def run_backward(self) -> None:
        with standing_in(self.groups, self.memory.parameters):
            grads = torch.autograd.grad(self.states, self.memory.parameters, self.grads)
        self.memory.flat.copy_(torch.cat([g.flatten() for g in grads]))

    def load(self, x, cos, sin, documents: Tensor | None, noise: Tensor | None) -> None:
        self.state.copy_(x)
        torch._foreach_copy_([self.cos, self.sin], [cos, sin])
        if documents is not None:  # the places left over hold empty documents at the end
            self.documents[: len(documents)], self.documents[len(documents) :] = documents, documents[-1]
        if noise is not None:
            self.noise.copy_(noise)


class _Replayed(torch.autograd.Function):
    """The states of decoder.run_loops(x); the parameters are there to be given their gradients. The states stay what
    they are until the next pass."""

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
            raise RuntimeError("another forward pass has been replayed since this one, over what it had kept")
        torch._foreach_copy_(captured.grads, dys)
        captured.backward()
        grads = memory.flat.clone().split([size.numel() for size in ctx.sizes])
        return *[None] * 6, *(g.view(size) for g, size in zip(grads, ctx.sizes, strict=True))


def run_by_plan(model: PeftModel, plan: Callable[[int], Plan], largest: int, last: bool, graphs: bool) -> None:
    """Makes training passes of a fused model run by their plans, in place; others, and those with a mask, run as
    before.

    plan: for a number of tokens, padding included, not more than `largest`. last: only the last loop's state is given,
    for an objective that reads no other. graphs: captured, a pair of graphs for each shape; the backward pass of a
    batch must then come before the next forward pass, which raises RuntimeError otherwise."""
    decoder = model.get_base_model().model
    run_loops, captured, parameters = decoder.run_loops, {}, adapters(decoder)
    like, loops = decoder.norm.weight.detach()[None], decoder.config.total_ut_steps
    waits = plan(largest).waiting
    waiting = Waiting(waits, largest * like.shape[-1], like) if waits else None
    if graphs:
        memory = GraphMemory(like, largest, decoder.config.head_dim, 1 if last else loops, parameters)
        model.get_base_model().graph_memory = memory

    def graphs_of(x, cos, documents: int, noise) -> Captured:
        """Warmed up at the first call. documents: of the pass, 0 where each row is one."""
        key = x.shape, len(cos), documents and room(documents)
        if key not in captured:
            planned = plan(x.shape[0] * x.shape[1])
            captured[key] = Captured(decoder, memory, x.detach(), cos, key[2], noise, loops, last, planned, waiting)
        return captured[key]

    def prepare(batch: int, width: int, documents: int, noise: bool) -> Captured:
        """The graphs of a shape of pass, to be captured before its first use and after all others are warmed up: no
        warm-up can use the memory of the graphs."""
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
