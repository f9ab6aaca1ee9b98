"""OTP of MC# (arXiv 2510.10962): a small network per layer says, token by token, how many of its experts are needed.

The network chooses among k masks, which keep the best 1, 2, ..., k of the experts that the router chose. It is trained
alone, against the unmasked layer, with the model's weights fixed: masks are drawn with Gumbel noise, gradients are
those of the softmax at a temperature that falls, and the loss is the squared error of the layer's routed output plus
``penalty`` times the share of experts kept. At run time the likeliest mask is taken.

Errors are relative to the mean squared length of the residual stream that the output joins, which makes one penalty fit
all layers: relative to the routed output itself, a reference model's loss rose about twice as much for as many
calls saved.

Written from a description of the paper; its code was not available. The authors' network, masks and schedule may
differ, and their loss is that of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from moezip.calibrate.skips import Lessons

BATCH = 1024
RATE = 0.01
# Temperatures of the first and the last step.
HOT, COLD = 4.0, 0.3
LEAST = 1e-4  # ratios below are taken for this where their logarithm is


@dataclass(frozen=True, slots=True)
class MaskNetwork:
    """Scores of the k masks, linear in a token's normalised input and in the logarithms of its gate ratios.

    Attributes:
        inputs: [k, D] float32. ratios: [k, k] float32. bias: [k] float32.
    """

    inputs: torch.Tensor
    ratios: torch.Tensor
    bias: torch.Tensor

    def scores(self, hidden: torch.Tensor, ratios: torch.Tensor) -> torch.Tensor:
        """[n, k] from inputs [n, D] of the experts module, in any dtype, and ratios [n, k] to the best gate."""
        length = hidden.float().square().mean(-1, keepdim=True).add(1e-12).rsqrt()
        return (
            (hidden.float() * length) @ self.inputs.T + ratios.clamp_min(LEAST).log() @ self.ratios.T + self.bias
        )  # fmt: skip

    def kept(self, hidden: torch.Tensor, ratios: torch.Tensor) -> torch.Tensor:
        """How many of the best experts each token keeps, [n], 1 to k; of equal scores the larger number."""
        best = self.scores(hidden, ratios).flip(-1).argmax(-1)
        return ratios.shape[-1] - best

    def to(self, device: torch.device) -> MaskNetwork:
        return MaskNetwork(self.inputs.to(device), self.ratios.to(device), self.bias.to(device))


def train(lessons: Lessons, *, penalty: float, steps: int, seed: int) -> MaskNetwork:
    """The network of one layer, by Adam on batches drawn with ``seed``.

    Args:
        penalty: what keeping all experts costs, in mean squared lengths of the residual stream; 0 asks for nothing but
            a small error, which keeping everything gives.
        steps: updates.

    Raises:
        MoezipError: the training diverged.
    """
    import math

    import torch

    from moezip.errors import MoezipError

    count, top_k = lessons.ratios.shape
    chance = torch.Generator().manual_seed(seed)
    costs = torch.arange(1, top_k + 1, dtype=torch.float32) * (penalty / top_k)
    products = lessons.products / max(lessons.scale, torch.finfo(torch.float32).tiny)
    # it begins by keeping all, because that is what it must not do worse than
    weights = [torch.zeros(top_k, lessons.inputs.shape[1]), torch.zeros(top_k, top_k), torch.zeros(top_k)]
    weights[2][-1] = 1.0
    for weight in weights:
        weight.requires_grad_(True)
    network = MaskNetwork(*weights)
    with _accelerator(lessons.inputs.device) as accelerator, torch.enable_grad():
        optimizer = accelerator.prepare(torch.optim.Adam(weights, RATE))
        for step in range(steps):
            heat = HOT * (COLD / HOT) ** (step / max(steps - 1, 1))
            rows = torch.randint(count, (min(BATCH, count),), generator=chance)
            scores = network.scores(lessons.inputs[rows], lessons.ratios[rows])
            noise = -torch.rand(scores.shape, generator=chance).clamp_(1e-9, 1 - 1e-7).log().neg().log()
            soft = ((scores + noise) / heat).softmax(-1)
            # forward one mask, backward the softmax
            mask = torch.zeros_like(soft).scatter_(1, soft.argmax(-1, keepdim=True), 1.0) + soft - soft.detach()
            error = torch.einsum("nc,ncd,nd->n", mask, products[rows], mask)
            loss = (error + mask @ costs).mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    found = MaskNetwork(*(weight.detach() for weight in weights))
    if not math.isfinite(sum(float(weight.abs().sum()) for weight in (found.inputs, found.ratios, found.bias))):
        raise MoezipError("the training of a mask network diverged", next="use another --set penalty=")
    return found


@contextmanager
def _accelerator(device: torch.device) -> Iterator[Accelerator]:
    """One that leaves tensors where they are. In a program that has set up accelerate for itself it has that program's
    device and precision, which touch nothing here, but steps of its own: those are one state for the whole process, and
    are put back as they were."""
    from accelerate import Accelerator
    from accelerate.state import GradientState, is_initialized

    steps = vars(GradientState())
    before = dict(steps)
    steps["sync_gradients"] = True
    try:
        yield Accelerator(
            cpu=device.type == "cpu" and not is_initialized(), device_placement=False, gradient_accumulation_steps=1
        )
    finally:
        steps.clear()
        steps.update(before)
