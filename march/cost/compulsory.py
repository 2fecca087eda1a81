"""Who does what in a step: labels by operator, and its compulsory traffic, the bytes that must cross its boundary.

The seam reports every operator call (`kernels.dispatch.observed`); a call's share of backward is found by walking the
autograd graph from its outputs to its inputs. What is left are the products of the linear layers ("linear"), and what
autograd does between operators ("other"): sums of gradients, copies that a layout asks for.

The compulsory traffic of a call is the least that any implementation moves, each tensor read or written once:
    forward   its inputs and outputs (attention: the log-sum-exp too, which backward cannot do without);
    backward  incoming gradients, what the formula needs (`saved` of its record), gradients of the inputs.
Keys and values that self-attention hands on are no output, they stay where they are; what comes back to them is an
incoming gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from kernels.operators import OPERATORS
from march.cost.counter import LINEAR, OTHER, Counter, tensor_bytes, tensors, total_bytes


@dataclass
class Compulsory:
    """Bytes of one call that cross its boundary."""

    operator: str
    phase: str
    bytes: int


class Observer:
    """Labels a counter by operator and collects compulsory traffic; `wrap` is for kernels.dispatch.observed."""

    def __init__(self, counter: Counter):
        self.counter = counter
        self.compulsory: list[Compulsory] = []
        self._hooked: set[Any] = set()

    def wrap(self, operator: str, function: Callable) -> Callable:
        """`function`, which computes `operator`, observed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.counter.note_launches()
            before, self.counter.operator = self.counter.operator, operator
            try:
                out = function(*args, **kwargs)
                self.counter.note_launches()
            finally:
                self.counter.operator = before
            # views of its own: what arrives at them comes from outside the operator
            out = tree_map(lambda x: x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x, out)
            self._note(operator, args, kwargs, out)
            self._label_backward(operator, tensors((args, kwargs)), tensors(out))
            return out

        return call

    def _note(self, operator: str, args: tuple, kwargs: Mapping[str, Any], out: Any) -> None:
        needs = OPERATORS[operator].saved
        named = dict(zip(OPERATORS[operator].contract.tensors, args, strict=False))
        given = tensors((args, kwargs))
        outputs = tensors(out)
        if operator == "residual_norm" and named["s"] is None:
            outputs = outputs[1:]  # y is x
        if kwargs.get("return_kv"):
            outputs = outputs[:1]  # keys and values are handed on where they are
        batch, length, heads = tensors(out)[0].shape[:3] if "lse" in needs else (0, 0, 0)
        lse = batch * length * heads * 4
        self.compulsory.append(Compulsory(operator, "forward", total_bytes(given) + total_bytes(outputs) + lse))
        wanted = [x for x in named.values() if isinstance(x, Tensor) and x.requires_grad]
        if not wanted:
            return
        if operator == "residual_norm" and kwargs.get("dropout") is None and len(wanted) == 3:
            wanted = wanted[1:]  # one gradient serves x and s
        needed = [named[one] for one in needs if named.get(one) is not None]
        needed += tensors(out)[:1] if "out" in needs else []
        backward = Compulsory(operator, "backward", total_bytes(needed) + total_bytes(wanted) + lse)
        self.compulsory.append(backward)

        def incoming(gradient: Tensor | None) -> None:
            backward.bytes += 0 if gradient is None else tensor_bytes(gradient)

        for x in tensors(out):
            if x.requires_grad:
                x.register_hook(incoming)

    def _label_backward(self, operator: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        ends = {x.grad_fn for x in inputs if x.grad_fn is not None}
        self._walk([x.grad_fn for x in outputs if x.grad_fn is not None], ends, lambda node: operator)

    def label_rest(self, loss: Tensor) -> None:
        """Labels what no operator owns, from the whole step's loss."""
        self._walk([loss.grad_fn], set(), lambda node: LINEAR if "mm" in node.name().lower() else OTHER)

    def _walk(self, start: list, ends: set, label: Callable[[Any], str]) -> None:
        stack, visited = list(start), set()
        while stack:
            node = stack.pop()
            if node is None or node in ends or node in visited:
                continue
            visited.add(node)
            if node not in self._hooked and (label(node) == OTHER or "AccumulateGrad" not in node.name()):
                self._hooked.add(node)
                node.register_prehook(self._enter(label(node)))
                node.register_hook(self._leave)
            stack.extend(parent for parent, _ in node.next_functions)

    def _enter(self, operator: str) -> Callable:
        def enter(gradients: tuple) -> None:
            self.counter.operator = operator
            self.counter.node += 1

        return enter

    def _leave(self, inputs: tuple, outputs: tuple) -> None:
        self.counter.note_launches()
        self.counter.operator = ""

    def linear_traffic(self) -> list[Compulsory]:
        """Of the products outside the operators: each layer's tensors once, forward and backward apart."""
        calls: dict[int, tuple[Compulsory, set[int]]] = {}
        for event in self.counter.events:
            if event.operator == LINEAR:
                # backward is two products that share the incoming gradient, of one node of the graph
                boundary, storages = calls.setdefault(
                    event.node or -len(calls) - 1, (Compulsory(LINEAR, event.phase, 0), set())
                )
                for number, size in event.touched:
                    if number not in storages:
                        storages.add(number)
                        boundary.bytes += size
        return [boundary for boundary, _ in calls.values()]
