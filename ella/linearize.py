"""Jacobian products of a trained model with respect to its weights."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from ella.inputs import (
    Inputs,
    check_inputs,
    input_tensors,
    map_inputs,
    num_examples,
    slices,
    take,
)
from ella.network import DifferentiableAttention, Network, called

DEFAULT_MEMORY_BUDGET = 2**30
"""Bytes of working memory that one Jacobian product may take (1 GiB)."""

Forward = Callable[[Mapping[str, Tensor], Inputs], Tensor]
"""Outputs (n, c) at given values of the trainable parameters."""

FORWARD_MODE = threading.Lock()
"""torch counts the levels of forward-mode differentiation for the whole process, not by thread."""


class Linearized:
    r"""A network f(x; θ) and its Jacobian J(x) = ∂f/∂θ, taken at its present weights.

    BatchNorm uses its running statistics, and γ, β count as weights; dropout is off. Attention is
    differentiated by formulas that forward mode supports (`DifferentiableAttention`).

    Rows of the Jacobian are computed for several examples at once by `torch.vmap`; a model that
    refuses it (its forward pass branches on values, as Hugging Face models do on their attention
    mask) is run one example after the other instead.

    All products work in chunks so that the memory they need beyond their result stays within
    `memory_budget`, estimated as (bytes that autograd keeps for one example, plus one gradient
    where one is needed per example) × chunk; a chunk is never smaller than one example or tangent.

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
        self.memory_budget = memory_budget
        self.trainable = self.network.trainable if trainable is None else trainable
        self._probed: dict[tuple, _Probe] = {}
        if not self.trainable:
            raise ValueError(
                "`model` has no trainable parameter, so it has no Jacobian. Set "
                "requires_grad=True on the weights whose uncertainty you want."
            )
        self._names = _all_names(self.network.model, self.trainable)

    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters, by name, sharing memory with the model."""
        return self.network.parameters(self.trainable)

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
        """The dtype of the network, used for all products."""
        return self.network.dtype

    def flat_parameters(self) -> Tensor:
        """θ, shape (p,): the trainable weights one after the other."""
        return torch.cat([p.reshape(-1) for p in self.parameters().values()])

    def __call__(self, x: Inputs) -> Tensor:
        """Outputs f(x) of shape (n, c); see `Network`."""
        return self.network(x)

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
        parameters = self.parameters()
        directions = unflatten(tangents, parameters)
        size, chunk = self._chunks(x, n)

        def products(forward: Forward, part: Inputs) -> Tensor:
            def product(direction: dict[str, Tensor]) -> Tensor:
                return jvp(lambda p: forward(p, part), (parameters,), (direction,))[1]

            return vmap(product, chunk_size=chunk, out_dims=-1)(directions)

        with FORWARD_MODE, self._forward() as forward:
            return torch.cat([products(forward, take(x, part)) for part in slices(n, size)])

    def vjp(self, x: Inputs, cotangents: Tensor) -> Tensor:
        r"""Sums over the examples :math:`\sum_i J(x_i)^\top u_{ij}`, for k cotangents each.

        Args:
            x: n examples.
            cotangents: u, shape (n, c, k).

        Returns:
            Shape (k, p).
        """
        x, n = self._admit(x)
        parameters = self.parameters()
        size, chunk = self._chunks(x, n)
        sums = cotangents.new_zeros(cotangents.shape[-1], self.num_parameters)
        with self._forward() as forward:
            for part in slices(n, size):
                inputs = take(x, part)
                _, pullback, *_ = vjp(lambda p, x=inputs: forward(p, x), parameters)
                (gradients,) = vmap(pullback, in_dims=-1, chunk_size=chunk)(cotangents[part])
                sums += flatten(gradients)
        return sums

    def row_gradients(self, x: Inputs, outputs: Tensor) -> Tensor:
        """One row of the Jacobian per example: ∂f(x_i)[outputs_i]/∂θ.

        Args:
            x: n examples.
            outputs: The chosen output of each example, shape (n,).

        Returns:
            Shape (n, p); that is all the memory needed beyond one chunk.
        """
        one_hot = nn.functional.one_hot(outputs, self.num_outputs(x)).to(self.dtype)
        return self._rows(x, one_hot.unsqueeze(1)).squeeze(1)

    def jacobian(self, x: Inputs) -> Tensor:
        """J(x) of shape (n, c, p): the caller keeps n·c·p small (see `jacobian_chunks`)."""
        c = self.num_outputs(x)
        eye = torch.eye(c, dtype=self.dtype, device=self.device)
        return self._rows(x, eye.expand(num_examples(x), c, c))

    def jacobian_chunks(self, x: Inputs) -> Iterator[tuple[slice, Tensor]]:
        """Jacobians of as many examples at a time as fit half of the memory budget.

        Yields:
            The slice of examples and their J, shape (chunk, c, p).
        """
        row_bytes = self.num_outputs(x) * self.num_parameters * self.dtype.itemsize
        size = max(1, self.memory_budget // 2 // row_bytes)
        for part in slices(num_examples(x), size):
            yield part, self.jacobian(take(x, part))

    def kernel_blocks(self, x: Inputs) -> Tensor:
        """κ(x_i, x_i) = J(x_i) J(x_i)ᵀ, shape (n, c, c), in the memory of one Jacobian chunk."""
        return torch.cat([jacobian @ jacobian.mT for _, jacobian in self.jacobian_chunks(x)])

    def kernel_diagonal(self, x: Inputs) -> Tensor:
        """The diagonal of κ(x_i, x_i), shape (n, c), in the memory of one Jacobian chunk."""
        return torch.cat([jacobian.square().sum(-1) for _, jacobian in self.jacobian_chunks(x)])

    def num_outputs(self, x: Inputs) -> int:
        """c, the number of outputs for inputs like `x`."""
        return self._probe(x).num_outputs

    def _rows(self, x: Inputs, cotangents: Tensor) -> Tensor:
        """Rows u_ijᵀ J(x_i) for cotangents u of shape (n, m, c); shape (n, m, p)."""
        x, _ = self._admit(x)
        if not self._probe(x).takes_vmap:
            return self._rows_in_turn(x, cotangents)
        parameters = self.parameters()
        m, row_bytes = cotangents.shape[1], self.num_parameters * self.dtype.itemsize
        chunk = max(1, self.memory_budget // (m * (2 * self._probe(x).kept_bytes + row_bytes)))

        with self._forward() as forward:

            def rows(cotangent: Tensor, example: Inputs) -> Tensor:
                _, pullback, *_ = vjp(lambda p: _of_one(forward, p, example), parameters)
                (gradients,) = vmap(pullback)(cotangent)
                return flatten(gradients)

            return vmap(rows, chunk_size=chunk)(cotangents, x)

    def _rows_in_turn(self, x: Inputs, cotangents: Tensor) -> Tensor:
        """`_rows`, one example and one cotangent at a time, written straight into the result."""
        parameters = self.parameters()
        found = cotangents.new_empty(*cotangents.shape[:2], self.num_parameters)
        with self._forward() as forward:
            for i, rows in enumerate(found):
                example = take(x, slice(i, i + 1))
                _, pullback, *_ = vjp(lambda p, x=example: forward(p, x), parameters)
                for cotangent, row in zip(cotangents[i], rows, strict=True):
                    (gradients,) = pullback(cotangent.unsqueeze(0))
                    torch.cat([g.reshape(-1) for g in gradients.values()], out=row)
        return found

    def _admit(self, x: Inputs) -> tuple[Inputs, int]:
        """Check inputs; copy those made in inference mode, which autograd refuses."""
        n = check_inputs(x, self.device)
        with torch.inference_mode(False):
            return map_inputs(x, lambda t: t.clone() if t.is_inference() else t), n

    @contextmanager
    def _forward(self) -> Iterator["Forward"]:
        """The network as a function of its trainable parameters and the inputs."""
        with self.network.borrowed() as module, DifferentiableAttention():

            def forward(parameters: Mapping[str, Tensor], x: Inputs) -> Tensor:
                state = {
                    alias: parameters[name]
                    for name, aliases in self._names.items()
                    for alias in aliases
                }
                state |= self.network.changing_buffers(module)
                return called(
                    lambda *args, **keywords: functional_call(
                        module, state, args, keywords, tie_weights=False
                    ),
                    x,
                )

            yield forward

    def _chunks(self, x: Inputs, n: int) -> tuple[int, int]:
        """How many examples, and how many (co)tangents over them, one product may carry."""
        activations = max(1, self._probe(x).kept_bytes)
        size = min(n, max(1, self.memory_budget // (2 * activations)))
        return size, max(1, self.memory_budget // (activations * size))

    def _probe(self, x: Inputs) -> "_Probe":
        """What one example says about all inputs of its shape."""
        key = tuple((tuple(t.shape[1:]), t.dtype) for t in input_tensors(x))
        if key not in self._probed:
            one, _ = self._admit(take(x, slice(1)))
            c = self(one).shape[1]
            parameters = {name: p.requires_grad_() for name, p in self.parameters().items()}
            weights = {p.data_ptr() for p in parameters.values()}
            kept: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                if tensor.data_ptr() not in weights:
                    kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
                return tensor

            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            with self._forward() as forward, torch.enable_grad(), hooks:
                forward(parameters, one)
            self._probed[key] = _Probe(c, sum(kept.values()), self._takes_vmap(one))
        return self._probed[key]

    def _takes_vmap(self, x: Inputs) -> bool:
        """Whether the forward pass can be batched by `vmap`."""
        parameters = self.parameters()
        try:
            with self._forward() as forward:
                vmap(lambda example: _of_one(forward, parameters, example))(x)
        except RuntimeError:  # all that vmap raises; an error of the model's own comes again
            return False
        return True

    def _check_width(self, name: str, tangents: Tensor) -> None:
        if tangents.ndim != 2 or tangents.shape[1] != self.num_parameters:
            raise ValueError(
                f"`{name}` must have shape (k, p) with p = {self.num_parameters}; got "
                f"{tuple(tangents.shape)}."
            )


def _of_one(forward: Forward, parameters: Mapping[str, Tensor], example: Inputs) -> Tensor:
    """Outputs (c,) of one example without its batch axis."""
    return forward(parameters, map_inputs(example, lambda t: t.unsqueeze(0))).squeeze(0)


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


class _Probe(NamedTuple):
    """What `Linearized` must know about inputs of one shape.

    Attributes:
        num_outputs: c.
        kept_bytes: What autograd keeps for the backward pass of one example.
        takes_vmap: Whether the model's forward pass can be batched by `vmap`.
    """

    num_outputs: int
    kept_bytes: int
    takes_vmap: bool


def flatten(gradients: Mapping[str, Tensor]) -> Tensor:
    """Concatenate (k, *shape) tensors into (k, p)."""
    return torch.cat([g.reshape(len(g), -1) for g in gradients.values()], dim=1)


def unflatten(tangents: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of a (k, p) tensor with the shapes (k, *shape) of the parameters: no copy."""
    sizes = [p.numel() for p in parameters.values()]
    parts = tangents.split(sizes, dim=1)
    return {
        name: part.reshape(len(part), *p.shape)
        for (name, p), part in zip(parameters.items(), parts, strict=True)
    }
