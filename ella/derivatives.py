"""Three kinds of Jacobian products, each by `torch.func` or, where that cannot go, by autograd."""

import threading
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from ella.attention import DifferentiableAttention
from ella.inputs import Inputs, Rows, map_inputs, model_inputs, num_examples, slices, take
from ella.modes import within
from ella.network import Network, called
from ella.outputs import as_rows

Parameters = dict[str, Tensor]
Forward = Callable[[Mapping[str, Tensor], Inputs], Tensor]
"""Outputs (n, c) at given values of the trainable parameters."""

FORWARD_MODE = threading.Lock()
"""torch counts the levels of forward-mode differentiation for the whole process, not by thread."""


class Products:
    """Products with the Jacobian of a network in some of its weights.

    Args:
        network: The model.
        names: For each weight θ all names by which modules reach it.
    """

    def __init__(self, network: Network, names: Mapping[str, list[str]]) -> None:
        self.network = network
        self.names = names

    def by_alias(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the weights under every name by which modules reach them."""
        return {alias: parameters[name] for name, all_ in self.names.items() for alias in all_}


class Functional(Products):
    """By `torch.func`: forward mode, and `vmap` over examples, tangents and cotangents."""

    def jvp(self, x: Inputs, parameters: Parameters, tangents: Tensor, chunk: int) -> Tensor:
        """J(x) v_j for tangents (k, p), `chunk` at a time: (n, c, k)."""
        directions = unflatten(tangents, parameters)

        with FORWARD_MODE, self.forward() as forward:

            def product(direction: Parameters) -> Tensor:
                return jvp(lambda p: forward(p, x), (parameters,), (direction,))[1]

            return vmap(product, chunk_size=chunk, out_dims=-1)(directions)

    def vjp(self, x: Inputs, parameters: Parameters, cotangents: Tensor, chunk: int) -> Tensor:
        """Σ_i J(x_i)ᵀ u_ij for cotangents (n, c, k), `chunk` at a time: (k, p)."""
        with self.forward() as forward:
            _, pullback, *_ = vjp(lambda p: forward(p, x), parameters)
            (gradients,) = vmap(pullback, in_dims=-1, chunk_size=chunk)(cotangents)
            return flatten(gradients)

    def rows(self, x: Inputs, parameters: Parameters, cotangents: Tensor) -> Tensor:
        """u_ijᵀ J(x_i) for cotangents (n, m, c), all at once: (n, m, p)."""
        x = x.unfolded() if isinstance(x, Rows) else x
        fields = (x.inputs, x.example, x.position) if isinstance(x, Rows) else x

        with self.forward() as forward:

            def one(p: Mapping[str, Tensor], example: Inputs) -> Tensor:
                single = map_inputs(example, lambda t: t.unsqueeze(0))
                single = Rows(*single) if isinstance(x, Rows) else single  # type: ignore[misc]
                return forward(p, single).squeeze(0)

            def each(cotangent: Tensor, example: Inputs) -> Tensor:
                _, pullback, *_ = vjp(lambda p: one(p, example), parameters)
                (gradients,) = vmap(pullback)(cotangent)
                return flatten(gradients)

            return vmap(each)(cotangents, fields)

    @contextmanager
    def forward(self) -> Iterator[Forward]:
        """The network as a function of its trainable parameters and the inputs."""
        with self.network.borrowed() as module, within(DifferentiableAttention()):

            def forward(parameters: Mapping[str, Tensor], x: Inputs) -> Tensor:
                state = self.by_alias(parameters) | self.network.changing_buffers(module)
                outputs = called(
                    lambda *args, **keywords: functional_call(
                        module, state, args, keywords, tie_weights=False
                    ),
                    self.network.own(model_inputs(x)),
                    self.network.output,
                )
                return as_rows(outputs, x)

            yield forward


class Plain(Products):
    """Products by ordinary autograd, one example and one output after the other.

    The weights of a private copy of the model are replaced by leaves of its own, which share their
    memory, so gradients never reach the user's tensors.
    """

    def jvp(self, x: Inputs, parameters: Parameters, tangents: Tensor, chunk: int) -> Tensor:
        """From rows, as (n, c, k): c backward passes an example, whatever k is."""
        products = []
        with self._all_leaves(parameters) as (module, leaves):
            for one in self._examples(x):
                outputs = self._outputs(module, one)
                each = [self._row(outputs, c, leaves) @ tangents.T for c in range(len(outputs[0]))]
                products.append(torch.stack(each))
        return torch.stack(products)

    def vjp(self, x: Inputs, parameters: Parameters, cotangents: Tensor, chunk: int) -> Tensor:
        """See `Functional.vjp`; one backward pass for each cotangent."""
        with self._all_leaves(parameters) as (module, leaves):
            outputs = self._outputs(module, self._own(x))
            k = cotangents.shape[-1]
            return torch.stack(
                [self._gradient(outputs, cotangents[..., j], leaves) for j in range(k)]
            )

    def rows(self, x: Inputs, parameters: Parameters, cotangents: Tensor) -> Tensor:
        """See `Functional.rows`."""
        p = sum(parameter.numel() for parameter in parameters.values())
        found = cotangents.new_empty(*cotangents.shape[:2], p)
        with self._all_leaves(parameters) as (module, leaves):
            for i, one in enumerate(self._examples(x)):
                outputs = self._outputs(module, one)
                for cotangent, row in zip(cotangents[i], found[i], strict=True):
                    row.copy_(self._gradient(outputs, cotangent.unsqueeze(0), leaves))
        return found

    def outputs(self, x: Inputs, parameters: Parameters) -> Tensor:
        """f(x) with its graph, of which nothing but its memory is of use."""
        with self._all_leaves(parameters) as (module, _):
            return self._outputs(module, self._own(x))

    def _examples(self, x: Inputs) -> Iterator[Inputs]:
        return (self._own(take(x, part)) for part in slices(num_examples(x), 1))

    @staticmethod
    def _own(x: Inputs) -> Inputs:
        """Copies: some models write into their inputs."""
        return map_inputs(x, Tensor.clone)

    def outputs_of(self, module: nn.Module, x: Inputs) -> Tensor:
        """What a module with `leaves` gives; n examples, as rows."""
        return as_rows(called(module, model_inputs(x), self.network.output), x)

    def _outputs(self, module: nn.Module, x: Inputs) -> Tensor:
        found = self.outputs_of(module, x)
        if not found.requires_grad:
            raise ValueError(
                "The outputs of `model` have no derivative in its trainable parameters: are they "
                "detached, converted or computed without autograd on the way?"
            )
        return found

    def _row(self, outputs: Tensor, c: int, leaves: list[nn.Parameter]) -> Tensor:
        return self._gradient(outputs, torch.eye(outputs.shape[1]).to(outputs)[c : c + 1], leaves)

    def _gradient(self, outputs: Tensor, direction: Tensor, leaves: list[nn.Parameter]) -> Tensor:
        """Of the sum of outputs × direction in all weights, shape (p,)."""
        direction = direction.to(outputs)
        try:
            gradients = torch.autograd.grad(
                outputs, leaves, direction, retain_graph=True, materialize_grads=True
            )
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise
            outputs.backward(direction, retain_graph=True)  # reentrant checkpoints know no other
            gradients = tuple(
                torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves
            )
            for leaf in leaves:
                leaf.grad = None
        return torch.cat([gradient.reshape(-1) for gradient in gradients])

    @contextmanager
    def _all_leaves(
        self, parameters: Parameters
    ) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """A copy of the model whose weights are leaves, and those leaves in the order of θ."""
        with self.leaves(parameters, set(parameters)) as (module, leaves):
            yield module, list(leaves.values())

    @contextmanager
    def leaves(
        self, parameters: Parameters, needing: Set[str]
    ) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
        """A copy of the model whose weights are parameters of its own, and these by name.

        Args:
            parameters: θ.
            needing: Names of those that require a gradient.
        """
        leaves = {
            name: nn.Parameter(_ordinary(p), requires_grad=name in needing)
            for name, p in parameters.items()
        }
        with (
            self.network.borrowed() as module,
            self.network.attention(),
            replaced_parameters(module, self.by_alias(leaves)),
            _recurrent_nets_that_train(module),
            torch.enable_grad(),
        ):
            yield module, leaves


@contextmanager
def replaced_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other parameters for a while; those that are not named need no gradient meanwhile."""
    named = dict(module.named_parameters(remove_duplicate=False))
    others = {
        name: nn.Parameter(_ordinary(old), requires_grad=False)
        for name, old in named.items()
        if name not in values
    }
    try:
        for name, value in {**others, **values}.items():
            _assign(module, name, value)
        yield
    finally:
        for name, old in named.items():
            _assign(module, name, old)


@contextmanager
def _recurrent_nets_that_train(module: nn.Module) -> Iterator[None]:
    """On CUDA their backward pass wants train mode, which is the same without dropout."""
    nets = [m for m in module.modules() if isinstance(m, nn.RNNBase) and m.weight_ih_l0.is_cuda]
    before = [(net.training, net.dropout) for net in nets]
    try:
        for net in nets:
            net.training, net.dropout = True, 0.0
        yield
    finally:
        for net, (training, dropout) in zip(nets, before, strict=True):
            net.training, net.dropout = training, dropout


def _ordinary(tensor: Tensor) -> Tensor:
    """Sharing its memory, but for one that was made in inference mode: autograd refuses those."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, value)  # not `_parameters`: an LSTM keeps a list


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of whatever device, was not enough."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate" in text)
    )


def flatten(gradients: Mapping[str, Tensor]) -> Tensor:
    """Concatenate (k, *shape) tensors into (k, p)."""
    return torch.cat([g.reshape(len(g), -1) for g in gradients.values()], dim=1)


def unflatten(tangents: Tensor, parameters: Parameters) -> Parameters:
    """Views of a (k, p) tensor with the shapes (k, *shape) of the parameters: no copy."""
    sizes = [p.numel() for p in parameters.values()]
    parts = tangents.split(sizes, dim=1)
    return {
        name: part.reshape(len(part), *p.shape)
        for (name, p), part in zip(parameters.items(), parts, strict=True)
    }
