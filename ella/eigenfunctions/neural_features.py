"""What `NeuralEF` leaves: networks that give φ(x) and R(x) for the price of one forward pass."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ella.activations import FeatureTaps, restored_taps
from ella.eigenfunctions.plan import Plan
from ella.eigenfunctions.residuals import DiagonalResidual, FactorResidual, LearnedResidual
from ella.inputs import Inputs
from ella.network import Network
from ella.predictive import LogitGaussian
from ella.saving import HALF, State
from ella.spectral import Eigenbasis, ResidualMLP, SideBySide

NetworkFactory = Callable[[int, tuple[int, int], torch.Generator], nn.Module]
"""`(num_inputs, (c, k), generator)` ↦ a module whose outputs have shape (n, c, k)."""

LEARNED: dict[str, type[LearnedResidual]] = {
    kind.__name__: kind for kind in (DiagonalResidual, FactorResidual)
}


@dataclass(frozen=True)
class Made:
    """What an eigen-network was made for, so that a saved one can be made again.

    Attributes:
        reads: "activations" or "inputs".
        num_inputs: Numbers it reads of one example.
        shape: (c, k).
    """

    reads: str
    num_inputs: int
    shape: tuple[int, int]

    def by(self, factory: NetworkFactory, generator: torch.Generator) -> nn.Module:
        """Call a factory; what it draws from the global generator follows from the given one."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed())
            return factory(self.num_inputs, self.shape, generator)

    @classmethod
    def restore(cls, state: State) -> "Made":
        """From a file; before networks were made by factories it told only k of a custom one.

        Raises:
            ValueError: If it makes no sense.
        """
        rows = len(state.tensor("mixing", (None, None)))
        if state.settings.get("made") is None:
            if state.settings.get("reads_inputs"):
                return cls("inputs", 0, (0, rows))
            made = state.part("network")
            reads = "activations"
        else:
            made = state.part("made")
            reads = made.text("reads")
        c, k = made.list("shape")
        found = cls(reads, made.integer("num_inputs", 2**31), (c, k))
        if reads not in ("activations", "inputs") or k != rows:
            raise ValueError(f"{found} does not fit a mixing of {rows} rows")
        return found


class NeuralFeatures:
    """φ(x) = ψ(x)A√μ and R(x), both from networks, in one forward pass with the logits.

    Args:
        taps: Read the classifier's activations.
        basis: ψA and μ, eigenpairs of the NTK.
        residual: Gives R; None drops it.
        made: What ψ reads, and of what shape it is.
    """

    def __init__(
        self,
        taps: FeatureTaps,
        basis: Eigenbasis,
        residual: LearnedResidual | None,
        made: Made,
    ) -> None:
        self.taps = taps
        self.basis = basis
        self.residual = residual
        self.made = made
        self.plan: Plan | None = None
        networks = [basis.network, *([] if residual is None else [residual.network])]
        same = made.reads == "activations"
        self._together = SideBySide.fitting(networks) if same else None

    def planned(self, plan: Plan | None) -> "NeuralFeatures":
        """The same, with what learning it was expected to take."""
        self.plan = plan
        return self

    def __call__(self, x: Inputs) -> LogitGaussian:
        """Evaluate at n inputs."""
        return self.read(x)[0]

    @torch.no_grad()
    def read(self, x: Inputs) -> tuple[LogitGaussian, Tensor]:
        """Evaluate at n inputs, with the activations (n, d) that were read on the way."""
        logits, activations = self.taps(x)
        if self._together is None:
            psi = self.basis.network(x if self.made.reads == "inputs" else activations)
            raw = [] if self.residual is None else [self.residual.network(activations)]
        else:
            psi, *raw = self._together(activations)
        residual = None if self.residual is None else self.residual.variances(*raw)
        return LogitGaussian(logits, self.basis.scaled(psi), residual), activations

    @property
    def rank(self) -> int:
        """The number of eigenfunctions, k."""
        return self.basis.mixing.shape[1]

    def state(self) -> State:
        """See `Eigenfunctions.state`."""
        network, parts = self.basis.network, {"network": State(self.basis.network.state_dict())}
        # Not `isinstance`: a class derived from it may do anything.
        described = network.settings() if type(network) is ResidualMLP else None
        residual = None
        if self.residual is not None:
            parts["residual"] = State(self.residual.state_dict())
            settings = self.residual.network.settings()
            residual = {"kind": type(self.residual).__name__, "network": settings}
        tensors = dict(State.joined(parts).tensors)
        return State(
            {**tensors, "mixing": self.basis.mixing, "eigenvalues": self.basis.eigenvalues},
            {
                "taps": [asdict(tap) for tap in self.taps.taps],
                "made": asdict(self.made),
                "network": described,
                "residual": residual,
            },
        )

    @classmethod
    def restore(
        cls, network: Network, state: State, factory: NetworkFactory | None
    ) -> "NeuralFeatures":
        """What `state` described; nothing is built before its sizes are checked.

        Args:
            network: The model.
            state: See `state`.
            factory: Makes the eigen-network if it is the user's own.

        Raises:
            ValueError: If a part is missing, misshaped or not finite, or the network is the user's
                own and no factory is given.
        """
        taps = FeatureTaps(network, restored_taps(state))
        made = Made.restore(state)
        mixing = state.tensor("mixing", (made.shape[1], None))
        # Files of version 0.1 hold A√μ as one matrix; eigenvalues of one leave it as it is.
        eigenvalues = mixing.new_ones(mixing.shape[1])
        if "eigenvalues" in state.tensors:
            eigenvalues = state.tensor("eigenvalues", tuple(eigenvalues.shape), mixing.dtype)
            if (eigenvalues < -1e-6 * eigenvalues.abs().max()).any():
                raise ValueError("`eigenvalues` must not be below 0")
        eigennetwork = _network(state, made, factory, mixing)
        residual = None
        if state.settings["residual"] is not None:
            residual = _residual(state, mixing)
        return cls(taps, Eigenbasis(eigennetwork, mixing, eigenvalues), residual, made)


def _network(state: State, made: Made, factory: NetworkFactory | None, like: Tensor) -> nn.Module:
    tensors = _widened(_under(state, "network"), like)
    network: nn.Module
    if state.settings["network"] is not None:
        network = ResidualMLP.restore(state.part("network").settings, tensors)
    elif factory is not None:
        # In the file's dtype first, so that no digit of the weights is lost.
        network = made.by(factory, torch.Generator()).to(like)
        network.load_state_dict(dict(tensors))
    else:
        raise ValueError(
            "the file holds weights of a custom eigen-network. Pass "
            "`eigenfunctions=NeuralEF(network=...)` with the same factory to load"
        )
    return network.eval().requires_grad_(False)


def _residual(state: State, like: Tensor) -> LearnedResidual:
    settings = state.part("residual")
    kind, tensors = LEARNED[settings.text("kind")], _under(state, "residual")
    under_network = _widened(_under(State(tensors), "network"), like)
    residual = kind(ResidualMLP.restore(settings.part("network").settings, under_network))
    for name in ("location", "spread", "highest"):
        residual.register_buffer(name, State(tensors).tensor(name, ()))
    return residual.eval().requires_grad_(False)


def _under(state: State, name: str) -> Mapping[str, Tensor]:
    """Tensors of a part whose settings are none."""
    named = state.tensors.items()
    return {k.removeprefix(f"{name}."): t for k, t in named if k.startswith(f"{name}.")}


def _widened(tensors: Mapping[str, Tensor], like: Tensor) -> Mapping[str, Tensor]:
    """With what was stored in half precision in the dtype of a tensor."""
    return {name: t.to(like) if t.dtype in HALF else t for name, t in tensors.items()}
