"""Merged weights that are no average of the members': solved group by group, on the tokens routed to them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from moezip.arch.spec import ExpertRole
from moezip.merge.layer import Merge, MergeLayer
from moezip.merge.least_squares import merged_expert
from moezip.merge.selection import chosen_neurons
from moezip.merge.truncate import truncated_expert
from moezip.plan.plan import Pick

if TYPE_CHECKING:
    import torch

Solve = Callable[[MergeLayer, Pick, float], "dict[ExpertRole, torch.Tensor] | None"]


def combined(layer: MergeLayer, params: Any, found: Merge) -> tuple[str, ...]:
    """Adds the solved matrices of every group to ``found``, rounded as the checkpoint stores them; notes.

    Groups that the text did not reach stay averages, and so do all with the settings of an average.

    Raises:
        MoezipError: inputs or outputs that are not finite.
    """
    rank = getattr(params, "rank", 1.0)
    if params.combine == "least-squares":
        solved = over_groups(merged_expert, layer, found.picks, params.ridge)
    elif params.combine == "neurons":
        solved = over_groups(chosen_neurons, layer, found.picks, params.ridge)
    elif rank < 1:
        solved = over_groups(truncated_expert, layer, found.picks, rank)
    else:
        return ()
    for number, matrices in solved.items():
        for role, value in matrices.items():
            found.solve_expert(layer.facts.layer, number, role, value.to(layer.dtype(role)))
    plain = sum(pick.mixed for pick in found.picks) - len(solved)
    return (f"{plain} groups that no token was routed to are plain averages",) if plain else ()


def over_groups(
    solve: Solve, layer: MergeLayer, picks: tuple[Pick, ...], setting: float
) -> dict[int, dict[ExpertRole, torch.Tensor]]:
    """By number of the output expert what ``solve`` gives for it, for groups of several; as many at a time as torch has
    threads, each computing alone, those of most members first."""
    import torch

    numbers = sorted((n for n, pick in enumerate(picks) if pick.mixed), key=lambda n: -len(picks[n].parts))

    def one(number: int) -> dict[ExpertRole, torch.Tensor] | None:
        with torch.no_grad():
            return solve(layer, picks[number], setting)

    with ThreadPoolExecutor(torch.get_num_threads(), "moezip-merge", torch.set_num_threads, (1,)) as pool:
        solved = dict(zip(numbers, pool.map(one, numbers), strict=True))
    return {number: value for number in sorted(solved) if (value := solved[number]) is not None}
