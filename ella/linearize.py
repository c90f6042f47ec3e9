"""Jacobian products of a trained model with respect to its weights."""

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ella.arguments import BYTES
from ella.derivatives import Functional, Parameters, Plain, is_out_of_memory
from ella.inputs import (
    Inputs,
    check_inputs,
    example_shape,
    map_inputs,
    num_examples,
    slices,
    take,
)
from ella.network import Network
from ella.routes import TIMED, Routes

log = logging.getLogger("ella")

DEFAULT_MEMORY_BUDGET = 2**30
"""Bytes of working memory that one Jacobian product may take (1 GiB)."""
CPU_CHUNK = 2**28
"""Bytes of one chunk of rows on a CPU: larger ones are slower, as they leave its caches."""


class Linearized:
    r"""A network f(x; θ) and its Jacobian J(x) = ∂f/∂θ, taken at its present weights.

    BatchNorm uses its running statistics, and γ, β count as weights; dropout is off. Attention is
    differentiated by formulas that forward mode supports (`DifferentiableAttention`).

    Each kind of product is first tried by `torch.func`, vmapped over examples or tangents, and
    compared with ordinary autograd on one example. A model that refuses it (its forward pass
    branches on values, it has an LSTM, activation checkpoints, an old `autograd.Function`, writes
    into its inputs, ...), or that gives something else, is differentiated by ordinary autograd,
    one example and one output after the other. The choice is made once and logged.

    All products work in chunks so that the memory they need beyond their result stays within
    `memory_budget`, estimated as (bytes that autograd keeps for one example, plus one gradient
    where one is needed per example) × chunk; a chunk is never smaller than one example or tangent.
    Where a device has less memory left than that, chunks are halved until they fit.

    Args:
        network: The model. One that is no `Network` yet becomes one.
        memory_budget: Bytes of working memory for one product.
        trainable: Names of the parameters θ, the others being constants; None takes those that
            require a gradient.

    Raises:
        TypeError: If `network` is not an `nn.Module`.
        ValueError: If no parameter requires a gradient, or one of those named is not there.
    """

    def __init__(
        self,
        network: Network | nn.Module,
        *,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        trainable: tuple[str, ...] | None = None,
    ) -> None:
        self.network = network if isinstance(network, Network) else Network(network)
        self.memory_budget = BYTES("memory_budget", memory_budget)
        self.trainable = (
            self.network.trainable if trainable is None else self.network.named(trainable)
        )
        self._probed: dict[tuple[object, ...], _Probe] = {}
        if not self.trainable:
            raise ValueError(
                "`model` has no trainable parameter, so it has no Jacobian. Set "
                "requires_grad=True on the weights whose uncertainty you want."
            )
        self.names = _all_names(self.network.model, self.trainable)
        self._routes = Routes(self.network, self.names)

    @torch.inference_mode(False)
    def parameters(self) -> Parameters:
        """The trainable parameters, by name, sharing memory with the model."""
        named = self.network.parameters(self.trainable)
        return {name: p.clone() if p.is_inference() else p for name, p in named.items()}

    @property
    def num_parameters(self) -> int:
        """p, the number of trainable weights."""
        return sum(p.numel() for p in self.parameters().values())

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the results: the network's, or float32 for half precision."""
        return self.network.wide

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the Jacobian."""
        return self.num_parameters * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes that one chunk of rows may take."""
        on_cpu = self.device.type == "cpu"
        return min(self.memory_budget, CPU_CHUNK) if on_cpu else self.memory_budget

    def flat_parameters(self) -> Tensor:
        """θ, shape (p,): the trainable weights one after the other."""
        return torch.cat([p.reshape(-1) for p in self.parameters().values()])

    def __call__(self, x: Inputs) -> Tensor:
        """Outputs f(x) of shape (n, c); see `Network`."""
        return self.network(x)

    @torch.inference_mode(False)
    def jvp(self, x: Inputs, tangents: Tensor) -> Tensor:
        r"""Products J(x) v_j with k tangents, which share one primal pass per chunk.

        Args:
            x: n examples.
            tangents: Directions v_j in weight space, shape (k, p).

        Returns:
            Shape (n, c, k).
        """
        x, n = self._admit(x)
        self._check_width("tangents", tangents)
        parameters, tangents = self.parameters(), tangents.to(self.network.dtype)
        route, (size, chunk) = self._route("jvp", x), self._chunks(x, n)
        parts = _halving(
            lambda part: route.jvp(take(x, part), parameters, tangents, chunk), n, size
        )
        return torch.cat([found.to(self.dtype) for _, found in parts])

    @torch.inference_mode(False)
    def vjp(self, x: Inputs, cotangents: Tensor) -> Tensor:
        r"""Sums over the examples :math:`\sum_i J(x_i)^\top u_{ij}`, for k cotangents each.

        Args:
            x: n examples.
            cotangents: u, shape (n, c, k).

        Returns:
            Shape (k, p).
        """
        x, n = self._admit(x)
        parameters, given = self.parameters(), cotangents.to(self.network.dtype)
        route, (size, chunk) = self._route("vjp", x), self._chunks(x, n)
        sums = cotangents.new_zeros(cotangents.shape[-1], self.num_parameters)
        for _, found in _halving(
            lambda part: route.vjp(take(x, part), parameters, given[part], chunk), n, size
        ):
            sums += found
        return sums

    @torch.inference_mode(False)
    def row_gradients(self, x: Inputs, outputs: Tensor) -> Tensor:
        """Some rows of the Jacobian of each example: ∂f(x_i)[outputs_ij]/∂θ.

        Args:
            x: n examples.
            outputs: The chosen output of each example, shape (n,), or several, shape (n, q).

        Returns:
            Shape (n, p) or (n, q, p); that is all the memory needed beyond one chunk.
        """
        chosen = outputs if outputs.ndim == 2 else outputs.unsqueeze(1)
        one_hot = nn.functional.one_hot(chosen, self.num_outputs(x)).to(self.dtype)
        found = self._rows(x, one_hot)
        return found if outputs.ndim == 2 else found.squeeze(1)

    @torch.inference_mode(False)
    def jacobian(self, x: Inputs) -> Tensor:
        """J(x) of shape (n, c, p): the caller keeps n·c·p small (see `jacobian_chunks`)."""
        c = self.num_outputs(x)
        eye = torch.eye(c, dtype=self.dtype, device=self.device)
        return self._rows(x, eye.expand(num_examples(x), c, c))

    def jacobian_chunks(self, x: Inputs) -> Iterator[tuple[slice, Tensor]]:
        """Jacobians of as many examples at a time as fit half of a chunk.

        Yields:
            The slice of examples and their J, shape (chunk, c, p); at least one example.
        """
        row_bytes = self.num_outputs(x) * self.row_bytes
        size = max(1, self.chunk_bytes // 2 // row_bytes)
        for part in slices(num_examples(x), size):
            yield part, self.jacobian(take(x, part))

    def over_rows(
        self, x: Inputs, function: Callable[[Tensor], Tensor], outputs: Tensor | None = None
    ) -> Tensor:
        """A function of rows of the Jacobian, in the memory of one chunk of them.

        Where the rows of one example exceed half of a chunk, they come a few at a time.

        Args:
            x: n examples.
            function: From rows (i, j, p) to (i, j, ...): each row by itself.
            outputs: The rows of each example, shape (n, q); None takes all c.

        Returns:
            Shape (n, q, ...), or (n, c, ...).
        """
        n = num_examples(x)
        if outputs is None:
            every = torch.arange(self.num_outputs(x), device=self.device)
            outputs = every.expand(n, len(every))
        fitting = max(1, self.chunk_bytes // 2 // self.row_bytes)
        q = outputs.shape[1]
        found = []
        for part in slices(n, max(1, fitting // q)):
            some = take(x, part)
            groups = (outputs[part, group] for group in slices(q, min(q, fitting)))
            parts = [function(self.row_gradients(some, group)) for group in groups]
            found.append(torch.cat(parts, dim=1))
        return torch.cat(found)

    def kernel_blocks(self, x: Inputs) -> Tensor:
        """κ(x_i, x_i) = J(x_i) J(x_i)ᵀ, shape (n, c, c), in the memory of one Jacobian chunk."""
        return torch.cat([jacobian @ jacobian.mT for _, jacobian in self.jacobian_chunks(x)])

    def kernel_diagonal(self, x: Inputs) -> Tensor:
        """The diagonal of κ(x_i, x_i), shape (n, c), in the memory of one chunk of rows."""
        return self.over_rows(x, lambda rows: rows.square().sum(-1))

    def num_outputs(self, x: Inputs) -> int:
        """c, the number of outputs for inputs like `x`."""
        return self._probe(x).num_outputs

    def kept_bytes(self, x: Inputs) -> int:
        """What autograd keeps for the backward pass of one example like `x`."""
        return self._probe(x).kept_bytes

    @torch.inference_mode(False)
    def time_rows(self, x: Inputs) -> None:
        """Find out how rows are computed fastest, before many of them (`Routes.time_rows`)."""
        x, n = self._admit(x)
        rows = min(self.num_outputs(x), TIMED)
        size = max(1, self.chunk_bytes // (rows * self._row_bytes(x)))
        self._routes.time_rows(take(x, slice(min(size, TIMED, n))), self.parameters())

    def rows_route(self, x: Inputs) -> str:
        """How rows at inputs like x are computed: "vmapped" or "one by one"."""
        return "one by one" if isinstance(self._route("rows", x), Plain) else "vmapped"

    @torch.inference_mode(False)
    def _rows(self, x: Inputs, cotangents: Tensor) -> Tensor:
        """Rows u_ijᵀ J(x_i) for cotangents u of shape (n, m, c); shape (n, m, p)."""
        x, n = self._admit(x)
        parameters, m = self.parameters(), cotangents.shape[1]
        route, given = self._route("rows", x), cotangents.to(self.network.dtype)
        if isinstance(route, Plain):
            return route.rows(x, parameters, given).to(self.dtype)
        size = max(1, self.chunk_bytes // (m * self._row_bytes(x)))
        if n <= size:  # nothing to join
            return route.rows(x, parameters, given).to(self.dtype)
        found = cotangents.new_empty(n, m, self.num_parameters, dtype=self.dtype)
        for part, rows in _halving(
            lambda part: route.rows(take(x, part), parameters, given[part]), n, size
        ):
            found[part] = rows
        return found

    def _admit(self, x: Inputs) -> tuple[Inputs, int]:
        """Check inputs; copy those made in inference mode, which autograd refuses."""
        n = check_inputs(x, self.device)
        return map_inputs(x, lambda t: t.clone() if t.is_inference() else t), n

    def _chunks(self, x: Inputs, n: int) -> tuple[int, int]:
        """How many examples, and how many (co)tangents over them, one product may carry."""
        activations = max(1, self._probe(x).kept_bytes)
        size = min(n, max(1, self.memory_budget // (2 * activations)))
        return size, max(1, self.memory_budget // (activations * size))

    # How to differentiate this model

    @torch.inference_mode(False)
    def _probe(self, x: Inputs) -> "_Probe":
        """What one example says about all inputs of its shape."""
        key = example_shape(x)
        if key not in self._probed:
            one, _ = self._admit(take(x, slice(1)))
            self._probed[key] = _Probe(self(one).shape[1], self._measured_bytes(one))
        return self._probed[key]

    def _measured_bytes(self, x: Inputs) -> int:
        plain = Plain(self.network, self.names)
        weights = {p.data_ptr() for p in self.network.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights:
                kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            plain.outputs(x, self.parameters())
        return sum(kept.values())

    def _route(self, product: str, x: Inputs) -> Functional | Plain:
        """What computes a kind of product."""
        return self._routes.of(product, take(x, slice(2)), self.parameters())

    def _row_bytes(self, x: Inputs) -> int:
        """What one row of one example takes while it is computed."""
        return 2 * self.kept_bytes(x) + self.row_bytes

    def _check_width(self, name: str, tangents: Tensor) -> None:
        if tangents.ndim != 2 or tangents.shape[1] != self.num_parameters:
            raise ValueError(
                f"`{name}` must have shape (k, p) with p = {self.num_parameters}; got "
                f"{tuple(tangents.shape)}."
            )


class _Probe(NamedTuple):
    """What `Linearized` must know about inputs of one shape.

    Attributes:
        num_outputs: c.
        kept_bytes: What autograd keeps for the backward pass of one example.
    """

    num_outputs: int
    kept_bytes: int


def _halving(
    product: Callable[[slice], Tensor], n: int, size: int
) -> Iterator[tuple[slice, Tensor]]:
    """A product of n examples, `size` at a time, or half of that where memory runs out.

    Raises:
        MemoryError: If there is not enough for one example.
    """
    start = 0
    while start < n:
        part = slice(start, min(start + size, n))
        try:
            found = product(part)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise MemoryError(
                    "There is not enough memory for the derivative of one example. Free some, or "
                    "freeze weights (requires_grad=False) that need no uncertainty."
                ) from error
        else:
            yield part, found
            start = part.stop
            continue
        # Outside of the handler, whose traceback keeps the failed product's tensors.
        size = (part.stop - part.start + 1) // 2
        log.info("out of memory: going on with %d examples at a time", size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _all_names(model: nn.Module, trainable: tuple[str, ...]) -> dict[str, list[str]]:
    """For each parameter all names by which modules reach it: tied weights have several.

    `functional_call` could tie them itself, but of a module with two names it then leaves the
    replacement of its weights in the model; here each module has one name.
    """
    named = dict(model.named_parameters())
    if missing := sorted(set(trainable) - named.keys()):
        raise ValueError(f"The model has no parameter named {missing[0]!r}.")
    first = {id(named[name]): name for name in trainable}
    names: dict[str, list[str]] = {name: [] for name in trainable}
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(tensor) in first:
                names[first[id(tensor)]].append(f"{path}.{name}" if path else name)
    return names
