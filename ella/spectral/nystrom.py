"""Leading eigenpairs of a Gram matrix, the classical route to eigenfunctions."""

import torch
from torch import Tensor


def leading_eigenpairs(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues of a symmetric positive semi-definite matrix.

    Args:
        gram: Shape (m, m); worked on in float64.
        rank: k.

    Returns:
        Eigenvalues (k,), decreasing, and eigenvectors (m, k), float64.

    Raises:
        ValueError: If fewer than k eigenvalues are above rounding error.
    """
    values, vectors = numerical_eigenpairs(gram)
    carried = len(values)
    if rank > carried:
        raise ValueError(
            f"`rank` is {rank}, but the {len(gram)} sampled rows span only {carried} directions. "
            f"Lower `rank` to at most {carried}, or sample more data."
        )
    return values[:rank], vectors[:, :rank]


def numerical_eigenpairs(gram: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenpairs above rounding error, decreasing: values (r,) and vectors (m, r), float64."""
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values.flip(0), vectors.flip(1)
    carried = int((values > torch.finfo(gram.dtype).eps * len(gram) * values[0]).sum())
    return values[:carried], vectors[:, :carried]


def row_gram(rows: Tensor) -> Tensor:
    """Inner products of m rows (m, p): (m, m) in float64, without a float64 copy of the rows."""
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for block in rows.split(max(1, 2**24 // len(rows)), dim=1):
        wide = block.double()
        gram += wide @ wide.T
    return gram
