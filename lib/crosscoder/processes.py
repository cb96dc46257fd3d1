"""How the work of training one crosscoder is shared out among several processes or machines.

Started by ``lib.crosscoder.launch``. The result is that of a single process, but for the rounding of sums: a
batch of ``batch_size`` tokens is the same batch, shared out.

- ``ByRows``: every process keeps the whole crosscoder and takes a part of each batch; gradients are added up
  (data parallel).
- ``ByFeatures``: every process keeps a part of the dictionary, with its optimiser state, and takes all of
  each batch; what the parts reconstruct is added up. For a dictionary that outgrows a device. BatchTopK only.

In both, BatchTopK's selection, dead features, the auxiliary loss's choice among them, and the clipped norm
are over the whole batch and dictionary. Checkpoints are those of a single process, so that a run can go on
with another number of processes. If a process ends, so do all others, with a sentence."""

import dataclasses
import functools

import torch
import torch.distributed as dist
from torch import Tensor

from ..settings import UserError
from .model import CrossCoder, Forward, forward
from .sparse import PreActivations, SparseBatch, largest_of_rows, select_rows

PER_FEATURE = ("W_dec", "W_enc", "b_enc", "log_theta")  # parameters of the crosscoder that are [F, ...]
TIMEOUT = 600  # seconds that a process waits for the others
SHARE = ("rows", "features")


class SingleProcess:
    """Training in one process; what several of them do otherwise overrides a method of this.

    ``over_rows``, ``over_features``: the sum over the processes that hold other rows of a batch, or features.
    ``any_row``: bools that are set in one of the processes with other rows.
    ``rows``: number of rows of a batch of which so many are here.
    ``part_of``: the part of a tensor [F, ...] that is kept here; ``joined``: all parts, only on rank 0.
    ``agreed``: what rank 0 says; also a barrier.

    All processes call all of these in the same order."""

    rank, size = 0, 1
    part = (0, 1)  # which rows of every batch are read here, as ``Store.reader`` has it

    def over_rows(self, here):
        return here

    over_features = any_row = rows = part_of = joined = agreed = over_rows

    def forward(self, *args, **options) -> Forward:
        """``crosscoder.forward`` over the whole batch and all features."""
        return forward(*args, **options)

    def gradient_norm(self, crosscoder: CrossCoder) -> Tensor:
        """Make the gradients those of the whole batch; returns the norm over all parameters."""
        return torch.nn.utils.get_total_norm([p.grad for p in crosscoder.parameters()])

    def check_same(self, value: int, what: str) -> None:
        """UserError if a process has another value."""


SINGLE_PROCESS = SingleProcess()


class Lost(UserError):
    """Another process of the training has ended, or does not answer."""


def _collective(function):
    """What the backend raises when a process is missing, as ``Lost``."""

    @functools.wraps(function)
    def wrapped(*args):
        try:
            return function(*args)
        except RuntimeError as error:  # gloo's and NCCL's errors are of this class
            raise Lost(
                "another process of this training ended or does not answer"
                f" ({str(error).splitlines()[0][:120]})"
            ) from error

    return wrapped


class Together(SingleProcess):
    """What sharing rows and sharing features have in common; the process group exists already."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), torch.device(device)

    @_collective
    def add(self, partial: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
        """The sum over all processes, the same in each; written into ``partial``."""
        dist.all_reduce(partial, operation)
        return partial

    @_collective
    def gather(self, own: Tensor) -> Tensor:
        """The 1-d tensors of all processes, of any lengths, one after the other; the same in each."""
        lengths = torch.zeros(self.size, dtype=torch.int64, device=own.device)
        lengths[self.rank] = len(own)
        dist.all_reduce(lengths)
        lengths = lengths.tolist()
        padded = own.new_zeros(max(*lengths, 1))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths)])

    def agreed(self, flag: bool) -> bool:
        return bool(self.add(torch.tensor(int(flag and self.rank == 0), device=self.device)))

    def check_same(self, value: int, what: str) -> None:
        values = self.gather(torch.tensor([value], device=self.device)).tolist()
        if len(set(values)) > 1:
            raise UserError(
                f"processes differ in {what} ({', '.join(map(str, values))}): all of them must see the same"
                " folders"
            )


class ByRows(Together):
    """Every process has all features, and rows rank, rank + size, ... of every batch."""

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__(device)
        self.part = (self.rank, self.size)

    def over_rows(self, partial: Tensor) -> Tensor:
        return self.add(partial.clone())

    def rows(self, own: int) -> int:
        return int(self.add(torch.tensor(own, device=self.device)))

    def any_row(self, flags: Tensor) -> Tensor:
        flags_here = flags.to(self.device, torch.uint8, copy=True)
        return self.add(flags_here, dist.ReduceOp.MAX).to(flags.device, torch.bool)

    def forward(self, crosscoder: CrossCoder, acts: list[Tensor], *args, **options) -> Forward:
        if len(acts[0]):
            return forward(crosscoder, acts, *args, **options, gather=self.gather)
        # The last batch of an epoch had fewer rows than there are processes. The others wait for an answer,
        # which is: nothing.
        stand_in = crosscoder.split(crosscoder.means[None], raw=True)
        out = forward(crosscoder, stand_in, *args, **options, gather=lambda own: self.gather(own[:0]))
        code = out.code.where(torch.zeros_like(out.code.features, dtype=torch.bool), out.code.floor)
        return dataclasses.replace(
            out,
            x=out.x[:0],
            code=dataclasses.replace(code, indptr=code.indptr[:1]),
            f=out.f[:0],
            x_hat=out.x_hat[:0],
            aux_hat=None if out.aux_hat is None else out.aux_hat[:0],
            near=None if out.near is None else out.near * 0,
        )

    def gradient_norm(self, crosscoder: CrossCoder) -> Tensor:
        for parameter in crosscoder.parameters():
            self.add(parameter.grad)
        return super().gradient_norm(crosscoder)


class ByFeatures(Together):
    """Every process has all rows of every batch, and about F / size neighbouring features. b_dec is in every
    process, with the same gradient, since all compute the same loss from the same sums."""

    def __init__(self, n_features: int, device: torch.device | str = "cpu"):
        super().__init__(device)
        self.bounds = [n_features * i // self.size for i in range(self.size + 1)]
        if n_features < self.size:
            raise UserError(
                f"n_features is {n_features}: there must be at least one for each of the {self.size}"
                " processes"
            )

    def over_features(self, partial: Tensor) -> Tensor:
        return self.add(partial.clone())

    def forward(self, *args, **options) -> Forward:
        options |= {"gather": self.gather, "strongest": self.strongest}
        return forward(*args, **options, add=lambda sums: _Sum.apply(sums, self))

    @torch.no_grad()
    def strongest(
        self, encoded: PreActivations, per_unit: Tensor, k: int, dead: Tensor
    ) -> SparseBatch | None:
        """The k strongest dead features of all processes: the entries that are here; None if nothing is dead.
        The k largest of all are among the k largest of each part: these are compared."""
        if not self.over_features(dead.any().int()):
            return None
        among = dead.nonzero().squeeze(-1)
        if len(among):
            code = select_rows(encoded, per_unit, k, among)
        else:
            indptr = among.new_zeros(len(encoded) + 1)
            code = SparseBatch(indptr, among, per_unit[:0], per_unit.new_zeros(()), len(per_unit))
        strength = code.values * per_unit[code.features]
        best = largest_of_rows(code, strength, k)
        everyone = self.gather(best.flatten()).view(self.size, len(encoded), k)
        floors = everyone.transpose(0, 1).flatten(1).topk(k, dim=-1, sorted=False).values.amin(-1)
        return code.where(strength >= floors[code.rows], floors.mean())

    def gradient_norm(self, crosscoder: CrossCoder) -> Tensor:
        own = [p.grad for name, p in crosscoder.named_parameters() if name in PER_FEATURE]
        squared = self.over_features(torch.nn.utils.get_total_norm(own).square())
        return (squared + crosscoder.b_dec.grad.square().sum()).sqrt()

    def part_of(self, tensor: Tensor) -> Tensor:
        return tensor[self.bounds[self.rank] : self.bounds[self.rank + 1]].clone()

    @_collective
    def joined(self, part: Tensor) -> Tensor:
        """In the memory of rank 0's host, where it comes part by part: no device has to hold it."""
        part = part.contiguous()
        if self.rank:
            dist.send(part, 0)
            return part.cpu()
        tensor = torch.empty(self.bounds[-1], *part.shape[1:], dtype=part.dtype)
        tensor[: self.bounds[1]] = part
        for rank in range(1, self.size):
            received = part.new_empty(self.bounds[rank + 1] - self.bounds[rank], *part.shape[1:])
            dist.recv(received, rank)
            tensor[self.bounds[rank] : self.bounds[rank + 1]] = received
        return tensor


class _Sum(torch.autograd.Function):
    """The sum of all processes' tensors; all compute the same loss from it, whose gradient is each one's."""

    @staticmethod
    def forward(ctx, partial: Tensor, together: Together) -> Tensor:
        return together.add(partial.clone())

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None
