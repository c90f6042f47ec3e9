"""What learning eigenfunctions is going to take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How the Jacobian at the inputs is computed, and what it is expected to take.

    Which sketch suits a model follows from the model alone, so that a seed always gives the same
    result; what differs by rounding only, such as whether whole rows are vmapped, is timed.

    Attributes:
        num_inputs: n, of this process.
        rows_each: q, rows of each input.
        num_outputs: c.
        num_weights: p.
        sketch: "count", of rows made whole, or "kronecker", layer by layer.
        sketch_size: Numbers that a row is sketched to.
        route: "vmapped" or "one by one", or "together" and "each alone" of a Kronecker sketch.
        blocks: Whether κ(x, x) is kept whole, else its diagonal.
        num_directions: r.
        seconds_each: Measured seconds of a row, when directions were found.
        chunk_bytes: Of one chunk of rows.
        itemsize: Bytes of a number.
    """

    num_inputs: int
    rows_each: int
    num_outputs: int
    num_weights: int
    sketch: str
    sketch_size: int
    route: str
    blocks: bool
    num_directions: int
    seconds_each: float
    chunk_bytes: int
    itemsize: int

    @property
    def seconds(self) -> float:
        """Expected for the pass over all inputs; learning comes after it."""
        return self.num_inputs * self.rows_each * self.seconds_each

    @property
    def memory_bytes(self) -> int:
        """Expected beyond the model: n·q·(r + 1) + s·r numbers, blocks, signs, and a chunk."""
        rows = self.num_inputs * self.rows_each
        numbers = rows * (self.num_directions + 1) + self.sketch_size * self.num_directions
        numbers += self.num_inputs * self.num_outputs**2 * self.blocks
        signs = self.num_weights if self.sketch == "count" else 0
        return numbers * self.itemsize + signs + self.chunk_bytes

    def __str__(self) -> str:
        rows = f"{self.rows_each} of {self.num_outputs} rows"
        return (
            f"{self.num_inputs} inputs, {rows} each, of {self.num_weights:,} weights, sketched to "
            f"{self.sketch_size:,} numbers ({self.sketch}, {self.route}) and "
            f"{self.num_directions} directions, with {'blocks' if self.blocks else 'diagonals'}: "
            f"about {self.seconds:.3g} s and {self.memory_bytes / 2**20:,.0f} MiB"
        )
