"""Texts that look unseen, from texts as token ids."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ella.arguments import SHARE, optional, settle, whole
from ella.inputs import MASK_KEY

SHORTEST = 4
"""Integers in rows shorter than this are taken for features, not for texts."""
EVERYWHERE = 4
"""Ids in every text of a batch of at least this many are taken for special tokens."""
NOT_IDS = ("type", "position", "mask", "label", "length", "index")


def is_ids(name: str, x: Tensor) -> bool:
    """Whether a tensor of this name holds token ids, shape (n, positions)."""
    whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    if not whole or x.ndim != 2 or x.shape[1] < SHORTEST:
        return False
    return not any(part in name for part in NOT_IDS) and bool((x > 1).any())


@dataclass(frozen=True)
class PerturbTokens:
    """Deletes some tokens, and replaces some by those of another text of the batch.

    A replacement comes from the same position of the other text, so that integers which are no
    text, a column of categories for example, stay among those seen in that column. Special tokens
    stay: `special`, the first and the last token of each text, and ids that are in every text of
    a batch. Deleted tokens leave padding, which needs an `attention_mask` and a known padding id.

    Attributes:
        delete: Share of the tokens that are deleted.
        replace: Share of the tokens that are replaced.
        special: Ids that stay, whatever the batch looks like.
        padding: The id of padding; None is what a batch has where its mask is 0.

    Raises:
        ValueError: If a number is out of range.
    """

    delete: float = 0.1
    replace: float = 0.15
    special: tuple[int, ...] = ()
    padding: int | None = None

    def __post_init__(self) -> None:
        ids = whole(-(2**63), 2**63 - 1)
        settle(self, delete=SHARE, replace=SHARE, padding=optional(ids))
        if not isinstance(self.special, (tuple, list)):
            raise ValueError(f"`special` must be a tuple of token ids; got {self.special!r}.")
        object.__setattr__(self, "special", tuple(ids("special", each) for each in self.special))

    def __call__(
        self, named: dict[str, Tensor], ids: str, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A batch with other tokens.

        Args:
            named: The tensors of the batch, by name.
            ids: The name of the token ids, shape (n, positions).
            generator: A CPU generator.
        """
        x, mask = named[ids], named.get(MASK_KEY)
        mask = mask if mask is not None and mask.shape == x.shape else None
        real = not_padding(x) if mask is None else mask != 0
        free = real & ~self._special(x, real)
        named = {**named, ids: self._replaced(x, free, generator)}
        padding = self._padding(x, mask)
        if mask is None or padding is None:
            return named
        draws = torch.rand(x.shape, generator=generator).to(x.device)
        return _without(named, ids, free & (draws < self.delete), padding)

    def _special(self, x: Tensor, real: Tensor) -> Tensor:
        """Where tokens stay as they are, (n, positions)."""
        before = torch.nn.functional.pad(real[:, :-1], (1, 0))
        after = torch.nn.functional.pad(real[:, 1:], (0, 1))
        found = real & ~(before & after)
        values, index = x.unique(return_inverse=True)
        if len(x) >= EVERYWHERE:
            present = torch.zeros(len(x), len(values), dtype=torch.bool, device=x.device)
            present.scatter_(1, index, True)
            found = found | present.all(0)[index]
        return found | torch.isin(x, torch.tensor(self.special, dtype=x.dtype, device=x.device))

    def _replaced(self, x: Tensor, free: Tensor, generator: torch.Generator) -> Tensor:
        order = torch.randperm(len(x), generator=generator).to(x.device)
        draws = torch.rand(x.shape, generator=generator).to(x.device)
        return torch.where(free & free[order] & (draws < self.replace), x[order], x)

    def _padding(self, x: Tensor, mask: Tensor | None) -> int | None:
        if self.padding is not None or mask is None:
            return self.padding
        found = x[mask == 0].unique()
        return int(found[0]) if len(found) == 1 else None


def not_padding(x: Tensor) -> Tensor:
    """Where ids (n, positions) without a mask are no padding: no run of one id at the end."""
    last = x[:, -1:]
    trailing = (x == last).flip(1).cumprod(1).flip(1).bool()
    return ~(trailing & (trailing.sum(1, keepdim=True) > 1))


def _without(
    named: dict[str, Tensor], ids: str, deleted: Tensor, padding: int
) -> dict[str, Tensor]:
    """Close the gaps, on the side where padding is; all that has positions moves along."""
    mask = named[MASK_KEY]
    at_the_left = bool((mask[:, 0] == 0).any()) and bool((mask[:, -1] != 0).all())
    order = (-deleted.int() if at_the_left else deleted.int()).argsort(dim=1, stable=True)
    if not at_the_left:  # behind all tokens, that is among the padding
        order = (deleted | (mask == 0)).int().argsort(dim=1, stable=True)
    found = {}
    for name, tensor in named.items():
        if tensor.shape[:2] != deleted.shape or "position" in name:
            found[name] = tensor
            continue
        index = order.reshape(*order.shape, *[1] * (tensor.ndim - 2)).expand_as(tensor)
        found[name] = tensor.gather(1, index)
    gone = deleted.gather(1, order)
    found[ids] = found[ids].masked_fill(gone, padding)
    found[MASK_KEY] = found[MASK_KEY].masked_fill(gone, 0)
    return found
