"""What is not packed in a packed model on the CPU: products, RMS norms and attention of a few new tokens.

Next to packed experts these are most of a token, because torch's kernels are made for many: ``use`` has them run on the
C++ library (``moezip.kernels.unpacked``). Everything stays what it was: a weight is still a parameter of its module, a
norm still one of its class, and whatever is not a few tokens on the CPU is torch's own, as are gradients and what
torch.compile makes.

This module imports transformers' models, so it is imported where one is built and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moezip.arch.ragged import Matrix
from moezip.kernels import products
from moezip.kernels.unpacked import MOST_TOKENS
from moezip.runtime import norms, one_layer, one_query, one_token, routers
from moezip.runtime.norms import DTYPES


def use(model: Any) -> None:
    """Has a model run on the C++ library what can be; without one nothing changes but the attention of one query."""
    one_query.use(model)
    if not products.available():
        return
    known: dict[int, Weight] = {}  # a head may share the embedding's
    for module in model.modules():
        if isinstance(module, Matrix):  # of an expert, which runs with the others of its layer
            continue
        for name, parameter in module._parameters.items():
            # those that are elsewhere, or are brought in when they are needed, are not for this
            if type(parameter) is nn.Parameter and _is_matrix(parameter):
                if id(parameter) not in known:
                    known[id(parameter)] = Weight.of(parameter)
                module._parameters[name] = known[id(parameter)]
    norms.use(model)
    routers.use(model)
    one_token.use(model)
    one_layer.use(model)


def _is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.dim() == 2 and parameter.dtype in DTYPES and parameter.is_cpu


class Weight(nn.Parameter):
    """A matrix [R, C] that ``F.linear`` multiplies on the C++ library, whoever asks: routers are no Linears."""

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Weight:
        """Of the same memory."""
        found = cls(parameter.data, parameter.requires_grad)
        found.__dict__.update(parameter.__dict__)
        return found

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():  # else every look at the weight comes here
            found = None
            if function is F.linear and not torch.compiler.is_compiling():
                found = _product(*args, **kwargs)
            return function(*args, **kwargs) if found is None else found


def _product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    """``F.linear``; None where that is torch's to do."""
    shape, dtype = input.shape, input.dtype
    rows, columns = weight.shape
    if (
        shape[-1] != columns
        or not 0 < input.numel() <= MOST_TOKENS * columns
        or torch.is_grad_enabled()
        or dtype not in DTYPES
        or weight.dtype != dtype
        or not input.is_cpu
        or not weight.is_cpu
        or not weight.is_contiguous()
        or (bias is not None and not (bias.dtype == dtype and bias.is_cpu and bias.is_contiguous()))
        or type(input) is not torch.Tensor
    ):
        return None
    given, out = input.contiguous(), torch.empty((*shape[:-1], rows), dtype=dtype)
    products.native().dense(
        weight.data_ptr(), DTYPES[dtype], (rows, columns), None if bias is None else bias.data_ptr(),
        given.data_ptr(), given.numel() // columns, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
