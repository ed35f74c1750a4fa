"""Several training processes: the number of this one, values of all, DeepSpeed on a CPU."""

import hashlib
import os
from typing import Any


def read_rank(name: str) -> int:
    """A number that torchrun gives each process: RANK, LOCAL_RANK or WORLD_SIZE."""
    return int(os.environ.get(name, "1" if name == "WORLD_SIZE" else "0"))


def gather(value: Any) -> list[Any]:
    """The `value` of every process, by rank; returns once all processes have called it."""
    import torch.distributed as dist

    if read_rank("WORLD_SIZE") == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def digest_weights(model: Any) -> str | None:
    """SHA-256 of the trained weights; None where ZeRO-3 or FSDP divides them among processes."""
    import torch
    from torch.distributed.tensor import DTensor

    sha = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            if hasattr(parameter, "ds_id") or isinstance(parameter, DTensor):
                return None
            flat = parameter.detach().cpu().contiguous().flatten()
            sha.update(flat.view(torch.uint8).numpy())
    return sha.hexdigest()


def allow_deepspeed_on_cpu() -> None:
    """Makes accelerate start DeepSpeed's processes over gloo on a machine without a GPU.

    accelerate has no backend for DeepSpeed there, and would train each process apart. Gloo gathers
    into views of the output, which autograd forbids on weights unless it is off.
    """
    import torch
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    prepare = PartialState._prepare_backend

    def prepare_gloo(state: Any, *args: Any, **kwargs: Any) -> Any:
        backend, kind = prepare(state, *args, **kwargs)
        return (backend, kind) if backend else ("gloo", DistributedType.MULTI_CPU)

    PartialState._prepare_backend = prepare_gloo
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, torch.no_grad()(getattr(dist, name)))
