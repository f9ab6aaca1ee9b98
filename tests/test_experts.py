"""The experts implementation of calibration against a readable twin and against the library's own two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moezip.calibrate import experts as module
from moezip.calibrate.experts import Routed, experts_forward
from tests.tiny import config_of

EXPERTS, HIDDEN, INNER = 5, 32, 16
# Products and sums of float32 and bfloat16 numbers of size 1 against the same in float64. A bfloat16 has 8 bits; an
# output is the end of two products, a gate and a weighted sum, each of which rounds.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """An experts module of one family with random weights: split halves, or transposed, interleaved, with biases."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    kinds: dict[str, Any] = {"mixtral": MixtralExperts, "gpt_oss": GptOssExperts}
    found = kinds[name](config_of(name, experts=EXPERTS))
    generator = torch.Generator().manual_seed(7)
    for tensor in found.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    return found.to(dtype).requires_grad_(False)


def inputs(ids: Any, dtype: torch.dtype = torch.float32, gates: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """Hidden states, ids [T, k] and gates that sum to 1."""
    index = torch.tensor(ids)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(index.shape[0], HIDDEN, generator=generator).to(dtype)
    weights = torch.rand(index.shape, generator=generator) + 0.1
    return hidden, index, (weights / weights.sum(1, keepdim=True)).to(gates or dtype)


def twin(experts: Any, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Token by token, expert by expert, in float64: the weighted sum [T, D] and every single output [T, k, D]."""
    outputs = torch.zeros(*ids.shape, hidden.shape[1], dtype=torch.float64)
    for t, row in enumerate(ids.tolist()):
        for j, e in enumerate(row):
            x, gate_up, down = hidden[t].double(), experts.gate_up_proj[e].double(), experts.down_proj[e].double()
            if type(experts).__name__ == "GptOssExperts":
                y = x @ gate_up + experts.gate_up_proj_bias[e].double()
                gate, up = y[0::2].clamp(max=experts.limit), y[1::2].clamp(-experts.limit, experts.limit)
                inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
                outputs[t, j] = inner @ down + experts.down_proj_bias[e].double()
            else:
                gate, up = (gate_up @ x)[:INNER], (gate_up @ x)[INNER:]
                outputs[t, j] = down @ (gate * torch.sigmoid(gate) * up)
    return (outputs * gates.double()[..., None]).sum(1), outputs


# One token; one expert per token; every expert for every token; experts without tokens (1 and 4); all to one expert.
ROUTES = {
    "one token": [[3, 0]],
    "top 1": [[3], [0], [0], [4]],
    "all experts": [[0, 1, 2, 3, 4], [4, 2, 0, 1, 3]],
    "idle experts": [[0, 2], [3, 2], [0, 3]],
    "one expert for all": [[2], [2], [2], [2], [2], [2], [2]],
    "one token, one expert": [[4]],
}
routes = pytest.mark.parametrize("ids", list(ROUTES.values()), ids=list(ROUTES))
families = pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@families
@routes
@dtypes
@pytest.mark.parametrize("gate_dtype", [torch.float32, None], ids=["fp32 gates", "own gates"])
def test_like_the_readable_twin(name: str, ids: Any, dtype: torch.dtype, gate_dtype: torch.dtype | None) -> None:
    experts, given = made(name, dtype), inputs(ids, dtype, gate_dtype)
    with torch.no_grad():
        got = experts_forward(experts, *given)
    wanted, _ = twin(experts, *given)
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    assert float((got.double() - wanted).abs().max()) <= ROUNDING[dtype] * max(1.0, float(wanted.abs().max()))
    assert float(wanted.abs().max()) > 0.1


@families
@routes
@dtypes
@pytest.mark.parametrize("gate_dtype", [torch.float32, None], ids=["fp32 gates", "own gates"])
def test_like_the_librarys_own(name: str, ids: Any, dtype: torch.dtype, gate_dtype: torch.dtype | None) -> None:
    experts, given = made(name, dtype), inputs(ids, dtype, gate_dtype)
    with torch.no_grad():
        got = experts_forward(experts, *given)
        tolerance = ROUNDING[dtype] * max(1.0, float(got.abs().max()))
        for implementation in ("eager", "grouped_mm"):
            experts.config._experts_implementation = implementation
            # the library rounds the k products one by one here, their sum there
            assert torch.allclose(got, experts(*given), rtol=0, atol=tolerance), implementation


@pytest.mark.parametrize("top_k", [1, 3])
@families
@dtypes
def test_two_threads_give_the_same_bits(name: str, top_k: int, dtype: torch.dtype, two_threads: None) -> None:
    experts = made(name, dtype)
    # 1300 tokens: three pieces of the gathering, so that both threads have work there too
    assert 2 * module.CHUNK < 1300
    ids = torch.rand(1300, EXPERTS, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :top_k].tolist()
    given = inputs(ids, dtype)
    seen = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        experts._moezip_routed = Routed()
        with torch.inference_mode():
            seen.append((experts_forward(experts, *given), experts._moezip_routed))
    (one, first), (two, second) = seen
    assert torch.equal(one, two)
    assert torch.equal(first.norms, second.norms)
    assert torch.equal(first.peaks, second.peaks)


@families
def test_gathering_in_pieces_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, given = made(name), inputs([[0, 2], [3, 2], [0, 3], [4, 1], [1, 0]])
    with torch.no_grad():
        whole = experts_forward(experts, *given)
        monkeypatch.setattr(module, "CHUNK", 2)
        assert torch.equal(whole, experts_forward(experts, *given))


@families
@dtypes
def test_norms_and_peaks_are_those_of_the_unweighted_outputs(name: str, dtype: torch.dtype) -> None:
    experts, given = made(name, dtype), inputs([[0, 2], [3, 2], [0, 3]], dtype)
    experts._moezip_routed = routed = Routed()
    with torch.no_grad():
        result = experts_forward(experts, *given)
    _, outputs = twin(experts, *given)
    tolerance = ROUNDING[dtype] * float(outputs.abs().max())
    assert routed.norms.dtype == torch.float32
    # a norm of 32 components gathers their errors: at most sqrt(32) < 6 times one
    assert float((routed.norms - outputs.norm(dim=-1)).abs().max()) < 6 * tolerance
    wanted = torch.zeros(EXPERTS, dtype=torch.float64)
    for row, output in zip(given[1].tolist(), outputs.abs().amax(-1).tolist()):
        for expert, peak in zip(row, output):
            wanted[expert] = max(float(wanted[expert]), peak)
    assert float((routed.peaks - wanted).abs().max()) < tolerance
    assert routed.peaks[1] == routed.peaks[4] == 0  # no token came
    assert routed.ids is given[1]
    assert routed.gates is given[2]
    assert routed.output is result


def test_a_negative_peak_counts_as_much_as_a_positive_one() -> None:
    experts, given = made("gpt_oss"), inputs([[2]])
    experts.down_proj.zero_()
    experts.down_proj_bias[2] = torch.linspace(-9.0, 4.0, HIDDEN)
    experts._moezip_routed = routed = Routed()
    with torch.no_grad():
        experts_forward(experts, *given)
    assert routed.peaks.tolist() == [0, 0, 9.0, 0, 0]


def test_padding_leaves_no_peak() -> None:
    experts, (hidden, ids, gates) = made("mixtral"), inputs([[0, 2], [3, 2], [0, 3]])
    seen = []
    for valid in (None, torch.tensor([True, False, True])):
        experts._moezip_routed = Routed()
        experts._moezip_routed.valid = valid
        with torch.no_grad():
            output = experts_forward(experts, hidden, ids, gates)
        seen.append((output, experts._moezip_routed))
    (all_output, everything), (output, masked) = seen
    # outputs and norms are there for every position (the recorder leaves padding out); peaks are of real tokens only
    assert torch.equal(all_output, output)
    assert torch.equal(everything.norms, masked.norms)
    experts._moezip_routed = alone = Routed()
    with torch.no_grad():
        experts_forward(experts, hidden[[0, 2]], ids[[0, 2]], gates[[0, 2]])
    # other companions in the product, so not necessarily the same bits
    assert torch.allclose(masked.peaks, alone.peaks, rtol=1e-6, atol=0)
    assert masked.peaks[2] <= everything.peaks[2]
    # one expert that padding alone reached: nothing
    experts._moezip_routed = none = Routed()
    none.valid = torch.zeros(3, dtype=torch.bool)
    with torch.no_grad():
        experts_forward(experts, hidden, ids, gates)
    assert not none.peaks.any()


def test_nothing_is_recorded_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, given = made("mixtral"), inputs([[0, 2]])
    monkeypatch.setattr(torch.linalg, "vector_norm", None)
    with torch.no_grad():
        experts_forward(experts, *given)


@families
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
def test_gradients_are_the_librarys(name: str, recorded: bool, two_threads: None) -> None:
    experts, (hidden, ids, gates) = made(name), inputs([[0, 2], [3, 2], [0, 3]])
    if recorded:
        experts._moezip_routed = Routed()
    names = ["gate_up_proj", "down_proj"]
    weights = [getattr(experts, each).requires_grad_() for each in names]
    leaves = [hidden.requires_grad_(), gates.requires_grad_(), *weights]
    cotangent = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(5))
    found = []
    for output in (experts_forward(experts, hidden, ids, gates), _differentiable(experts, hidden, ids, gates)):
        found.append(torch.autograd.grad((output * cotangent).sum(), leaves))
    for label, got, wanted in zip(["hidden", "gates", *names], *found):
        assert float(wanted.abs().max()) > 0.01, label
        assert float((got - wanted).abs().max()) < 10 * ROUNDING[torch.float32] * float(wanted.abs().max()), label
    if recorded:
        assert not experts._moezip_routed.norms.requires_grad


def _differentiable(experts: Any, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The library's loop over experts, which gradients pass through with nothing of ours."""
    experts.config._experts_implementation = "eager"
    result: torch.Tensor = experts(hidden, ids, gates)
    return result


def test_a_fault_inside_a_thread_comes_out(two_threads: None) -> None:
    experts, given = made("mixtral"), inputs([[0, 2], [3, 2]])
    experts.down_proj = torch.nn.Parameter(torch.zeros(EXPERTS, HIDDEN, INNER + 1), requires_grad=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="mat1"):
        experts_forward(experts, *given)
