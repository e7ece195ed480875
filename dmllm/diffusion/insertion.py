"""The insertion ("any-length") corruption process: a token is shown, becomes the mask token, or is gone.

Run backwards, every token is inserted as a mask at a time of its own and unmasked at a later one, so that a text grows
from nothing and its length need not be known. With two schedules, of insertion and of unmasking, n(t) = 1 - alpha(t):

    P(gone at t)              n_insertion(t)
    P(masked at t | there)    n_unmasking(t) / n_unmasking(s), where s is the time of its insertion
    rates at t                each gone token is inserted, each masked one unmasked, at -alpha'(t) / n(t)

Both linear: gone t, masked -t log t, shown 1 - t + t log t, and both rates 1/t.
What is gone is known to a model by the gaps it leaves: of each gap the expected number g of missing tokens is learned.

Source: Kim et al., FlexMDM, arXiv:2509.01025, section 4 (whose time runs the other way); code brianlck/FlexMDM.
Time: t = 0 is clean, t = 1 is nothing. Randomness is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmllm.diffusion.schedules import NoiseSchedule

SHOWN, MASKED, GONE = 0, 1, 2
NODES = 48  # of the quadrature; the integrand is smooth


@dataclass(frozen=True)
class Insertion:
    """The two schedules."""

    insertion: NoiseSchedule
    unmasking: NoiseSchedule

    def times(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """When tokens are inserted and when they are unmasked, [...] float64 each; the second is never the greater.

        Args:
            uniform: [..., 2] in [0, 1).
        """
        uniform = uniform.double()  # 1 - alpha keeps few digits of a small noise level
        inserted = self.insertion.time(uniform[..., 0])
        level = uniform[..., 1] * (1 - self.unmasking.alpha(inserted))
        return inserted, self.unmasking.time(level)

    def states(self, t: Tensor, uniform: Tensor) -> Tensor:
        """SHOWN, MASKED or GONE at time t [...], for `uniform` [..., 2] as of `times`."""
        inserted, unmasked = self.times(uniform)
        return torch.where(inserted < t, GONE, torch.where(unmasked < t, MASKED, SHOWN))

    def probabilities(self, t: Tensor) -> Tensor:
        """P(SHOWN), P(MASKED), P(GONE) at t [...] > 0, [..., 3] float64."""
        gone = 1 - self.insertion.alpha(t.double())
        nodes, weights = _legendre(t.device)
        depth = -gone.log()[..., None]  # the integral over times of insertion, in -log n
        level = (-depth * nodes).exp()
        left = 1 - self.unmasking.alpha(self.insertion.time(level))
        masked = (1 - self.unmasking.alpha(t.double())) * (depth * weights * level / left).sum(-1)
        return torch.stack([1 - gone - masked, masked, gone], -1)


def divergence(log_expected: Tensor, missing: Tensor, *, tight: bool = False) -> Tensor:
    """y - g + g log(g / y) in nats, [...] float32: what it costs to expect y missing tokens in a gap where g are.

    Args:
        log_expected: [...], log y.
        missing: [...], g.
        tight: leave out g log g, which y does not change. It says which of g tokens has come first, and a text does not
            depend on that: without it the sum over all gaps and times is a tight bound, and may be below 0; with it,
            above by `orders` of the text's length.
    """
    log_expected, missing = log_expected.float(), missing.float()
    cost = log_expected.exp() - missing - missing * log_expected
    return cost if tight else cost + torch.xlogy(missing, missing)


def orders(length: int) -> list[float]:
    """For texts of 0 to `length` tokens, the mean over all orders in which their tokens may come of the sum of log g,
    g being the missing tokens of each one's gap: C(n) = log n + 2/n (C(0) + ... + C(n - 1)), as quicksort's costs."""
    found = [0.0]
    for n in range(1, length + 1):
        found.append(float(torch.tensor(n, dtype=torch.float64).log()) + 2 / n * sum(found))
    return found


def _legendre(device: torch.device) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1] (Golub and Welsch), [NODES] float64 each."""
    k = torch.arange(1, NODES, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return ((nodes + 1) / 2).to(device), vectors[0].square().to(device)
