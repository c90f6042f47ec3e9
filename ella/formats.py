"""What files may hold: the classes that settings are rebuilt from, and older formats."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ella.distance import Distance
from ella.eigenfunctions import LastLayer, NeuralEF, Nystrom, Perturb, PerturbTokens
from ella.hyperparameters import Hyperparameters, Tuning
from ella.likelihoods import Bernoulli, Categorical, Normal
from ella.links import LaplaceBridge, MonteCarlo, Probit
from ella.network import Network
from ella.saving import State, custom_names, describe, rebuild
from ella.spectral import NestedLoRA, NeuralEFObjective, TraceObjective, Training

KINDS: dict[str, Callable[..., Any]] = {
    kind.__name__: kind
    for kind in (
        *(Bernoulli, Categorical, Normal),
        *(LastLayer, NeuralEF, Nystrom, Perturb, PerturbTokens),
        *(NestedLoRA, NeuralEFObjective, TraceObjective, Training),
        *(LaplaceBridge, MonteCarlo, Probit),
        *(Hyperparameters, Tuning, Distance),
    )
}
"""By name, all that `rebuild` may call for a file."""

METHODS = {method.__name__: method for method in (NeuralEF, Nystrom, LastLayer)}


def upgraded(state: State, network: Network) -> State:
    """A file of format 1 (version 0.1) in the terms of today's.

    It knew the rank and the residual of the method, no other setting. For regression its G was
    divided by the noise variance of `fit`, which it did not keep; here it is multiplied by the one
    in use, so that all predictions are the same.

    Raises:
        KeyError: If something is missing.
        ValueError: If something makes no sense.
    """
    old = state.settings
    fitted = dict(state.part("eigenfunctions").settings)
    hyperparameters = Hyperparameters(**old["hyperparameters"])
    regression = old["likelihood"] == "regression"
    likelihood = Normal(hyperparameters.noise_variance) if regression else Categorical()
    noise = hyperparameters.noise_variance if regression else 1.0
    total = state.part("sums").number("log_likelihood")
    statistics = [-2 * noise * total, 0.0] if regression else [total]
    tensors = {
        f"fitted.{name.removeprefix('eigenfunctions.')}": tensor
        for name, tensor in state.tensors.items()
        if name.startswith("eigenfunctions.")
    }
    tensors["sums.curvature"] = state.tensor("curvature", (None, None)) * noise
    tensors["sums.statistics"] = torch.tensor(statistics, dtype=torch.float64)
    same = old["fingerprint"] == old_fingerprint(network.model)
    options = {"prior_precision": None, "temperature": 1.0, "logit_temperature": 1.0}
    return State(
        tensors,
        {
            "fingerprint": network.fingerprint() if same else "",
            "trainable": list(network.trainable),
            "likelihood": describe(likelihood),
            "eigenfunctions": _method(old),
            "options": {**options, "seed": old["seed"], "memory_budget": 2**30},
            "hyperparameters": describe(hyperparameters),
            "tuning": None,
            "link": None,
            "fitted": fitted,
            "sums": dict(state.part("sums").settings),
        },
    )


def _method(old: Any) -> Any:  # noqa: ANN401 - JSON
    name, rank = old["method"], old["rank"]
    if name not in METHODS or old["eigenfunctions"].get("reads_inputs"):
        return {"type": "custom", "name": "eigen-network" if name in METHODS else name}
    settings = {"residual": old["residual"]}
    return {"type": name, **settings, **({} if rank is None else {"rank": rank})}


def old_fingerprint(model: nn.Module) -> str:
    """The fingerprint of format 1: SHA-256 over names, shapes, dtypes and values of the state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def given_or_saved(state: State, name: str, given: object) -> Any:  # noqa: ANN401 - checked by its user
    """What the caller gives, or what a file says.

    Raises:
        ValueError: If the file cannot say it, and the caller does not.
    """
    description = state.settings.get(name) if name == "output" else state.settings[name]
    if given is not None:
        return given
    if found := custom_names(description, name):
        raise ValueError(
            f"it was made with a custom {' and a custom '.join(found)}, which no file holds. Pass "
            f"`{name}=` with the same object"
        )
    return rebuild(description, KINDS)
