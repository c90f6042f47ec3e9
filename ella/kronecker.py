"""Sketches of the Jacobian's rows layer by layer, without making a row."""

import math
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from ella.derivatives import Plain, is_out_of_memory
from ella.inputs import Inputs, Rows, map_inputs, num_examples, slices, take
from ella.linearize import Linearized
from ella.modes import within
from ella.sketches import SKETCH_SIZE, folded, random_signs
from ella.tracing import Tracing
from ella.uses import Projection, Use

KRONECKER_SIZE = 2**13
"""Numbers that all layers share in a Kronecker sketch."""
LEAST_SIDE = 4
"""Rows that a projection has at least."""
TRIED = 3
"""Examples that a Kronecker sketch is compared with exact rows on."""


class KroneckerSketch:
    r"""Layer by layer P G Qᵀ for the gradient G of a weight, which is never formed.

    A linear or convolution layer has G = Σ_t g_t a_tᵀ, of inputs a_t and output gradients g_t at
    positions t, so a row costs a backward pass through activations alone, whatever p is. Weights
    of normalisations, biases, and what is used in other ways are exact, and folded if they are
    more than `SKETCH_SIZE`. Inner products, and with them norms and blocks, are unbiased estimates
    over the random P and Q; norms are exact for layers with few positions.

    Whether what is traced is the whole gradient is seen by comparison with exact rows, weight by
    weight; whether examples can share a pass, by comparison with each alone.

    Args:
        linearized: The model.
        x: Some examples to try it on.
        seed: Of P, Q and signs.

    Attributes:
        size: s.
        together: Whether several examples share a pass.

    Raises:
        ValueError: If less than half of the weights can be sketched so.
    """

    name: ClassVar[str] = "kronecker"

    def __init__(self, linearized: Linearized, x: Inputs, seed: int) -> None:
        self.linearized, self.network = linearized, linearized.network
        self._plain = Plain(self.network, linearized.names)
        self._like = torch.zeros((), dtype=linearized.dtype, device=linearized.device)
        shapes = {name: p.shape for name, p in linearized.parameters().items()}
        self._layers = _projections(shapes, seed, self._like)
        self._sizes = {name: shape.numel() for name, shape in shapes.items()}
        self._traced = frozenset(shapes)
        self.together = False
        x = take(x, slice(TRIED))
        self._find_traced(x)
        exact = sum(n for name, n in self._sizes.items() if name not in self._layers)
        self._signs = random_signs(exact, seed, linearized.device)
        self.size = sum(p.size for p in self._layers.values()) + min(exact, SKETCH_SIZE)
        self._try_together(x)

    def route(self, x: Inputs) -> str:
        """See `RowSketch.route`."""
        return "together" if self.together else "each alone"

    def rows(self, x: Inputs, outputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `RowSketch.rows`; norms are estimates."""
        n, c = num_examples(x), self.linearized.num_outputs(x)
        eye = torch.eye(c, dtype=self._like.dtype, device=self._like.device)
        cotangents = eye.expand(n, c, c) if outputs is None else eye[outputs]
        kept = 3 * self.linearized.kept_bytes(x) + 8 * self.size * cotangents.shape[1]
        size = max(1, self.linearized.chunk_bytes // kept) if self.together else 1
        parts = [self._sketched(take(x, i), cotangents[i]) for i in slices(n, size)]
        return torch.cat([each for each, _ in parts]), torch.cat([norm for _, norm in parts])

    def blocks(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """See `RowSketch.blocks`; blocks are estimates."""
        sketches, norms = self.rows(x)
        blocks = sketches @ sketches.mT
        blocks.diagonal(dim1=1, dim2=2).copy_(norms)
        return sketches, blocks

    # How it is computed

    def _sketched(self, x: Inputs, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """Sketches (n, m, s) and squared norms (n, m) of rows uᵀJ(x) for u of shape (n, m, c)."""
        n, m = cotangents.shape[:2]
        sketches, norms = self._like.new_empty(n, m, self.size), self._like.new_empty(n, m)
        with self._traced_pass(x) as passed:
            for i in range(m):
                layers, exact, squares = passed.gradients(cotangents[:, i])
                norms[:, i] = exact.square().sum(-1)
                parts = []
                for name, projection in self._layers.items():
                    part = layers.get(name)
                    if part is None:
                        part = self._like.new_zeros(n, projection.size)
                    square = squares.get(name)
                    norms[:, i] += part.square().sum(-1) if square is None else square
                    parts.append(part)
                if exact.shape[1] > SKETCH_SIZE:
                    exact = folded(exact, self._signs, SKETCH_SIZE)
                sketches[:, i] = torch.cat([*parts, exact], dim=1)
        return sketches, norms

    @contextmanager
    def _traced_pass(self, x: Inputs) -> "Iterator[_Pass]":
        """A forward pass over n examples whose gradients can be asked for."""
        n = num_examples(x)
        if isinstance(x, Rows):  # each with an input of its own
            rows = take(x.inputs, x.example)
            x = Rows(rows, torch.arange(n, device=x.example.device), x.position)
        parameters = self.linearized.parameters()
        with self._plain.leaves(parameters, needing=set(parameters) - self._traced) as (
            module,
            leaves,
        ):
            names = {id(leaves[name]): name for name in self._traced}
            with within(Tracing(names, self._layers, n, self._like)) as tracing:
                outputs = self._plain.outputs_of(module, map_inputs(x, Tensor.clone))
            if outputs.ndim != 2 or len(outputs) != n:
                raise ValueError("rows of outputs are not those of the examples")
            others = {name: leaves[name] for name in parameters if name not in self._traced}
            order = [name for name in parameters if name not in self._layers]
            yield _Pass(outputs, tracing, others, order, self._sizes, self._like)

    # What can be traced

    def _find_traced(self, x: Inputs) -> None:
        """Weights whose traced gradients are right; the others are leaves of autograd."""
        one = take(x, slice(1))
        with self._traced_pass(one) as passed:
            seen = passed.names()
        self._leave_out(self._traced - seen)
        for i in range(num_examples(x)):
            one = take(x, slice(i, i + 1))
            c = self.linearized.num_outputs(one)
            u = nn.functional.one_hot(torch.tensor([[i % c]]), c).to(self._like)
            expected = self._exact(one, u)
            with self._traced_pass(one) as passed:
                layers, exact, _ = passed.gradients(u[:, 0])
            found = {name: part.flatten() for name, part in layers.items()}
            found |= passed.split(exact.flatten())
            scale = max(part.abs().max().item() for part in expected.values())
            wrong = {
                name
                for name, part in expected.items()
                if name in self._traced and not self._same(found.get(name), part, scale)
            }
            self._leave_out(wrong)
        sketched = sum(self._sizes[name] for name in self._layers)
        if 2 * sketched < sum(self._sizes.values()):
            raise ValueError("most weights are not those of linear layers or convolutions")

    def _leave_out(self, names: Set[str]) -> None:
        self._traced -= names
        self._layers = {n: p for n, p in self._layers.items() if n not in names}

    def _exact(self, x: Inputs, cotangents: Tensor) -> dict[str, Tensor]:
        """By ordinary autograd: what the sketch of each weight's gradient should be."""
        parameters = self.linearized.parameters()
        row = self._plain.rows(x, parameters, cotangents.to(self.network.dtype))
        parts = row.to(self._like).flatten().split([p.numel() for p in parameters.values()])
        found = {}
        for (name, parameter), part in zip(parameters.items(), parts, strict=True):
            projection = self._layers.get(name)
            found[name] = part if projection is None else projection(part.view(parameter.shape))
        return found

    def _same(self, found: Tensor | None, expected: Tensor, scale: float) -> bool:
        """Equal but for rounding: in its own units, as parts differ in size by many orders.

        Some gradients are 0 but for rounding, such as those of the biases of keys in attention:
        below a share of `scale`, the largest of all parts, nothing is compared.
        """
        if found is None:
            return False
        eps = torch.finfo(self.network.dtype).eps
        tolerance = 1e4 * eps * expected.abs().max() + 100 * eps * scale
        return bool((found - expected).abs().max() <= tolerance)

    def _parts(self, sketches: Tensor) -> tuple[Tensor, ...]:
        """Of each layer, then of what is exact; (n, m, ·) each."""
        sizes = [projection.size for projection in self._layers.values()]
        return sketches.split([*sizes, self.size - sum(sizes)], dim=-1)

    def _try_together(self, x: Inputs) -> None:
        """Whether several examples in one pass give what each gives alone."""
        n = num_examples(x)
        if len(self._traced) < len(self._sizes) or n < 2:
            return
        c = self.linearized.num_outputs(x)
        outputs = (torch.arange(n, device=self._like.device) % c).unsqueeze(1)
        alone = self.rows(x, outputs)[0]
        self.together = True
        try:
            together, scale = self.rows(x, outputs)[0], alone.abs().max().item()
            pairs = zip(self._parts(together), self._parts(alone), strict=True)
            same = all(self._same(*pair, scale) for pair in pairs if pair[1].numel())
        except Exception as error:  # anything may be raised in the user's forward pass
            if is_out_of_memory(error):
                raise
            same = False
        self.together = same


class _Pass:
    """One forward pass, and the gradients that come back through it."""

    def __init__(
        self,
        outputs: Tensor,
        tracing: Tracing,
        others: Mapping[str, Tensor],
        order: list[str],
        sizes: Mapping[str, int],
        like: Tensor,
    ) -> None:
        self.outputs, self.tracing, self.others = outputs, tracing, others
        self.order, self.sizes, self.like = order, sizes, like

    def names(self) -> set[str]:
        """Of the weights that were used in ways that are traced."""
        found: set[str] = set()
        for use in self.tracing.uses:
            found |= {name for name in use.names if name is not None}
        return found

    def split(self, exact: Tensor) -> dict[str, Tensor]:
        """Gradients of weights that are exact, by name, from all of them (e,)."""
        parts = exact.split([self.sizes[name] for name in self.order])
        return dict(zip(self.order, parts, strict=True))

    def gradients(self, cotangent: Tensor) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Of uᵀf for u of shape (n, c).

        Returns:
            Sketches (n, a·b) by name; all exact gradients (n, e); exact squared norms (n,) of
            sketched ones, by name, as far as they are cheap.
        """
        n = len(cotangent)
        for use in self.tracing.uses:
            use.gradient = None
        leaves = list(self.others.values())
        gradients = torch.autograd.grad(
            self.outputs,
            [*self.tracing.roots, *leaves],
            cotangent.to(self.outputs),
            retain_graph=True,
            allow_unused=True,
        )[len(self.tracing.roots) :]
        found = {
            name: gradient.reshape(1, -1).to(self.like)
            for name, gradient in zip(self.others, gradients, strict=True)
            if gradient is not None
        }
        layers: dict[str, Tensor] = {}
        squares: dict[str, Tensor | None] = {}
        for use in self.tracing.uses:
            self._add(use, found, layers, squares)
        nothing = self.like.new_zeros(n, 0)  # of a model without biases and norms
        empty = {name: self.like.new_zeros(n, self.sizes[name]) for name in self.order}
        parts = (found.get(name, empty[name]) for name in self.order)
        exact = torch.cat([nothing, *parts], dim=1)
        return layers, exact, {name: s for name, s in squares.items() if s is not None}

    def _add(
        self,
        use: Use,
        found: dict[str, Tensor],
        layers: dict[str, Tensor],
        squares: dict[str, Tensor | None],
    ) -> None:
        """What one use contributes; a weight may have several."""
        if use.gradient is None:
            return
        for name, part in use.exact(use.gradient.to(self.like)).items():
            found[name] = found[name] + part if name in found else part
        sketched = use.sketched(use.gradient)
        if sketched is not None:
            name, part, square = sketched
            squares[name] = None if name in layers else square
            layers[name] = layers[name] + part if name in layers else part


def _projections(
    shapes: Mapping[str, torch.Size], seed: int, like: Tensor
) -> dict[str, Projection]:
    """Of weights with several axes, whose sketches have about `KRONECKER_SIZE` numbers."""
    large = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    generator, each = torch.Generator().manual_seed(seed), KRONECKER_SIZE // max(len(large), 1)
    found = {}
    for name, shape in large.items():
        o, i = shape[0], shape[1:].numel()
        rows = max(LEAST_SIDE, math.isqrt(each))
        columns = max(LEAST_SIDE, each // min(o, rows))
        rows = max(LEAST_SIDE, each // min(i, columns))
        found[name] = Projection.random((o, i), (rows, columns), generator).to(like)
    return found
