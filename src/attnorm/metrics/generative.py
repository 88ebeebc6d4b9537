"""How near generated images are to real ones, from their features: Fréchet distance, Inception Score, KID, precision
and recall, and what resampling the generated images says about the first two.

Everything is float64, on the features' device (on the CPU where that has no float64).
"""

# N generated images, M real ones, D dimensions of their features, L logits, R columns of a Gaussian's factor.

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnorm.config import UserError
from attnorm.metrics.intervals import Interval, interval_about
from attnorm.system.randomness import permutation, resampled_counts

Progress = Callable[[int, int], None]  # resamples done, resamples in all

# What tells streams of random numbers of one seed apart; `intervals` has 4.
_KERNEL, _FRECHET, _SCORE = 5, 6, 7


def _float64(values: Tensor) -> Tensor:
    return (values.cpu() if values.device.type == "mps" else values).double()


def _require_features(name: str, features: Tensor, least: int = 1) -> None:
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"got {tuple(features.shape)} for {name}; expected [N, D] with N at least {least}")
    num_bad = int((~features.isfinite()).any(1).sum())
    if num_bad:
        raise UserError(
            f"the {name} of {num_bad} of {len(features)} images are not finite, so there is no score: the extractor's "
            "weights or the device are at fault"
        )


class Moments:
    """Number, mean and covariance of features that come in parts, in any order and by any number of processes.

    Parts are merged by the update of Chan, Golub and LeVeque (1983), about their own means: a mean much larger than the
    spread costs no digits.

    Args:
        dimensions: D; 0: that of the first features.
    """

    def __init__(self, dimensions: int = 0) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)  # [D]
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T, [D, D]

    def add(self, features: Tensor) -> None:
        """Takes in features, [N, D] of any float dtype; N may be 0."""
        _require_features("features", features, least=0)
        part = Moments(features.shape[1])
        if len(features):
            values = _float64(features)
            part.count, part.mean = len(values), values.mean(0)
            centred = values - part.mean
            part.scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other: Moments) -> None:
        """Takes in what another one has seen.

        With n and m images and d the difference of the means: mean += d m / (n + m), and
        scatter += other's + d d^T n m / (n + m).
        """
        if other.count == 0:
            return
        if self.count == 0 and self.mean.shape in ((0,), other.mean.shape):
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
            return
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"got features of {len(other.mean)} dimensions after {len(self.mean)}; expected equal ones"
            )
        total = self.count + other.count
        difference = other.mean.to(self.mean.device) - self.mean
        self.mean = self.mean + difference * (other.count / total)
        between = torch.outer(difference, difference) * (self.count * other.count / total)
        self.scatter = self.scatter + other.scatter.to(self.mean.device) + between
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """[D, D], with the divisor N - 1 of `numpy.cov` and of every published FID."""
        if self.count < 2:
            raise ValueError(f"got {self.count} images; expected at least 2 for a covariance")
        return self.scatter / (self.count - 1)

    def state(self) -> dict[str, Tensor]:
        """All there is to keep or to send: count (int64, no axes), mean [D] and scatter [D, D]."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Moments:
        moments = cls()
        moments.count = int(state["count"].item())
        moments.mean, moments.scatter = state["mean"], state["scatter"]
        return moments


class Gaussian(NamedTuple):
    """A normal law whose covariance is factor @ factor.T, singular or not."""

    mean: Tensor  # float64 [D]
    factor: Tensor  # float64 [D, R], contiguous: as it is when it is read back, or products would differ in a last bit
    count: int  # type: ignore[assignment]  # of images that it was estimated from; a tuple's method is not missed

    @classmethod
    def from_features(cls, features: Tensor) -> Gaussian:
        """Of features [N, D] of any float dtype, N at least 2.

        Where N <= D the factor is the centred features themselves over sqrt(N - 1), exact and narrow.
        """
        _require_features("features", features, least=2)
        if len(features) > features.shape[1]:
            moments = Moments()
            moments.add(features)
            return cls.from_moments(moments)
        values = _float64(features)
        mean = values.mean(0)
        return cls(mean, (values - mean).T.contiguous() / (len(values) - 1) ** 0.5, len(values))

    @classmethod
    def from_moments(cls, moments: Moments) -> Gaussian:
        """With S = V diag(e) V^T, the factor is V diag(sqrt(e)). N images leave at most N - 1 values that are not 0:
        the others are rounding, as are negative ones, and have no columns.
        """
        values, vectors = torch.linalg.eigh(moments.covariance)  # in ascending order
        rank = min(len(values), moments.count - 1, int((values > 0).sum()))
        kept = slice(len(values) - rank, None)
        return cls(moments.mean, vectors[:, kept].contiguous() * values[kept].sqrt(), moments.count)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two normal laws (Heusel et al., 2017), exact for singular ones too:

        |m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr sqrt(S1 S2)

    With S1 = A A^T and S2 = B B^T, the eigenvalues of S1 S2 = A (A^T B B^T) that are not 0 are those of
    (A^T B) (A^T B)^T, for XY and YX share them. These are the squared singular values of A^T B, so that Tr sqrt(S1 S2)
    is the sum of the singular values themselves: no root is taken of a matrix that rounding has made indefinite.

    Only with the features of the standard extractor is it called FID.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"got {len(first.mean)} and {len(second.mean)} dimensions; expected features of one extractor")
    device = first.mean.device
    mean, factor = second.mean.to(device), second.factor.to(device)
    cross = torch.linalg.svdvals(first.factor.T @ factor).sum()
    distance = (first.mean - mean).square().sum() + first.factor.square().sum() + factor.square().sum() - 2 * cross
    return max(distance.item(), 0.0)  # of equal laws rounding may leave less than 0, which a distance is not


class InceptionScore:
    """exp of the mean over images of KL(p(y | x) || p(y)) (Salimans et al., 2016), of images that come in parts.

    The images are split by their number into contiguous parts, which differ in length by one at most; each has its own
    p(y) and score. Per split it keeps the sum of p(y | x) and that of its entropies, for

        mean KL = sum_y q_y log(1 / q_y) - mean_x sum_y p_y log(1 / p_y)    with q = mean_x p

    Args:
        num_images: N, all that will be added, by whatever process.
        splits: Number of parts, from 1 to N; published scores have 10, or 1.
    """

    def __init__(self, num_images: int, splits: int) -> None:
        if not 1 <= splits <= num_images:
            raise ValueError(f"got {splits} splits of {num_images} images; expected 1 to {num_images}")
        self.num_images, self.splits = num_images, splits
        self._edges = [split * num_images // splits for split in range(splits + 1)]
        self._counts = torch.zeros(splits, dtype=torch.int64)
        self._entropies = torch.zeros(splits, dtype=torch.float64)  # sums over images, in nats
        self._probabilities = torch.zeros(splits, 0, dtype=torch.float64)  # sums over images, [splits, L]

    def add(self, logits: Tensor, start: int) -> None:
        """Takes in logits [N, L] of the images numbered from `start` on; each number once, in any order."""
        _require_features("logits", logits, least=0)
        if start < 0 or start + len(logits) > self.num_images:
            raise ValueError(
                f"got images {start} to {start + len(logits) - 1}; expected numbers from 0 to {self.num_images - 1}"
            )
        part = InceptionScore(self.num_images, self.splits)
        probabilities, entropies = _probabilities_and_entropies(logits)
        slices = [slice(max(low - start, 0), max(high - start, 0)) for low, high in itertools.pairwise(self._edges)]
        part._counts = torch.tensor([len(entropies[images]) for images in slices])
        part._entropies = torch.stack([entropies[images].sum() for images in slices])
        part._probabilities = torch.stack([probabilities[images].sum(0) for images in slices])
        self.merge(part)

    def merge(self, other: InceptionScore) -> None:
        """Takes in what another one has seen of the same images."""
        if (self.num_images, self.splits) != (other.num_images, other.splits):
            raise ValueError(
                f"got {other.splits} splits of {other.num_images} images; expected {self.splits} of {self.num_images}"
            )
        if not other._counts.any():
            return
        device = self._entropies.device if self._counts.any() else other._entropies.device
        if self._probabilities.shape[1] == 0:
            self._probabilities = torch.zeros_like(other._probabilities)
        self._counts = self._counts + other._counts
        self._entropies = self._entropies.to(device) + other._entropies.to(device)
        self._probabilities = self._probabilities.to(device) + other._probabilities.to(device)

    def score(self, splits: int) -> tuple[float, float]:
        """Mean and standard deviation (divisor `splits`) over the splits: either all of them or 1, of which it is 0."""
        if splits not in (1, self.splits):
            raise ValueError(f"got {splits} splits; expected 1 or the {self.splits} that were counted")
        expected = [high - low for low, high in itertools.pairwise(self._edges)]
        if self._counts.tolist() != expected:
            raise ValueError(f"got {self._counts.tolist()} images in the splits; expected {expected}, each image once")
        counts = self._counts.to(self._entropies.device)
        totals = (self._probabilities, self._entropies, counts)
        probabilities, entropies, counts = (total.sum(0, keepdim=True) for total in totals) if splits == 1 else totals
        marginals = torch.special.entr(probabilities / counts[:, None]).sum(1)
        scores = (marginals - entropies / counts).exp()
        return scores.mean().item(), scores.std(correction=0).item()

    def state(self) -> dict[str, Tensor]:
        """All there is to keep or to send: num_images and counts (int64), entropies and probabilities."""
        return {
            "num_images": torch.tensor(self.num_images),
            "counts": self._counts,
            "entropies": self._entropies,
            "probabilities": self._probabilities,
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> InceptionScore:
        score = cls(int(state["num_images"].item()), len(state["counts"]))
        score._counts = state["counts"].cpu()
        score._entropies, score._probabilities = state["entropies"], state["probabilities"]
        return score


def inception_score(logits: Tensor, splits: int) -> tuple[float, float]:
    """Mean and standard deviation over the splits, of all logits [N, L] at once; see `InceptionScore`."""
    score = InceptionScore(len(logits), splits)
    score.add(logits, 0)
    return score.score(splits)


def _probabilities_and_entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p(y | x) [N, L] and its entropies in nats [N]."""
    logarithms = _float64(logits).log_softmax(1)
    probabilities = logarithms.exp()
    return probabilities, -(probabilities * logarithms).sum(1)


def kernel_distance(
    fakes: Tensor, reals: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the squared maximum mean discrepancy (KID, Binkowski et al.,
    2018), whose kernel is k(x, y) = (x . y / D + 1)^3:

        mean of k(x, x') over x != x' + mean of k(y, y') over y != y' - 2 mean of k(x, y)

    It is unbiased, so that it may be less than 0.

    Args:
        fakes, reals: Features, [N, D] and [M, D], at least 2 each.
        subset_size: Images of each kind in a subset, drawn without replacement; no more than there are of either.
        seed: Of the draws.
    """
    for name, features in (("fakes", fakes), ("reals", reals)):
        _require_features(name, features, least=2)
    size = min(subset_size, len(fakes), len(reals))
    if size < 2 or subsets < 1:
        raise ValueError(f"got {subsets} subsets of {subset_size} images; expected at least 1 of at least 2")
    fakes, reals = _float64(fakes), _float64(reals)
    stream = np.random.PCG64([seed, _KERNEL])

    def draw(features: Tensor) -> Tensor:
        rows = permutation(stream, len(features))[:size]
        return features[torch.from_numpy(rows).to(features.device)]

    values = np.array([_discrepancy(draw(fakes), draw(reals).to(fakes.device)) for _ in range(subsets)])
    return values.mean().item(), values.std().item()


def _discrepancy(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate above, of as many of each."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    pairs = len(first) * (len(first) - 1)
    within = sum((k.sum() - k.trace()).item() for k in (kernel(first, first), kernel(second, second))) / pairs
    return within - 2 * kernel(first, second).mean().item()


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1], but for the density, which has no upper bound."""

    precision: float  # of the fakes, those in the ball of any real one (Kynkäänniemi et al., 2019)
    recall: float  # of the reals, those in the ball of any fake one
    density: float  # balls of real ones that a fake is in, on average, over the neighbours (Naeem et al., 2020)
    coverage: float  # of the reals, those in whose ball any fake is


def precision_recall(reals: Tensor, fakes: Tensor, *, neighbours: int = 3, block: int = 2048) -> PrecisionRecall:
    """Precision and recall of features, [M, D] and [N, D]: an image's ball reaches to its k-th nearest neighbour among
    the others of its kind, not counting itself, border included.

    Args:
        neighbours: k, less than both numbers of images.
        block: Features at a time on either side: memory is O(block^2 + block D) beside the features.
    """
    for name, features in (("reals", reals), ("fakes", fakes)):
        _require_features(name, features, least=neighbours + 1)
    reals, fakes = _float64(reals), _float64(fakes)
    fakes = fakes.to(reals.device)
    centre = reals.mean(0)  # distances come from products, which lose the digits that a common mean takes
    reals, fakes = reals - centre, fakes - centre
    radii, fake_radii = (_radii(features, neighbours, block) for features in (reals, fakes))

    num_balls, precise = 0, []
    recalled = torch.zeros(len(reals), dtype=torch.bool, device=reals.device)
    covered = recalled.clone()
    for some_fakes, some_radii in zip(fakes.split(block), fake_radii.split(block), strict=True):
        is_precise = torch.zeros(len(some_fakes), dtype=torch.bool, device=reals.device)
        for start in range(0, len(reals), block):
            these = slice(start, start + block)
            distances, rounding = _squared_distances(some_fakes, reals[these])
            in_real = distances <= radii[these] + rounding
            is_precise |= in_real.any(1)
            covered[these] |= in_real.any(0)
            recalled[these] |= (distances <= some_radii[:, None] + rounding).any(0)
            num_balls += int(in_real.sum())
        precise.append(is_precise)
    shares = (torch.cat(precise), recalled, covered)
    precision, recall, coverage = (share.double().mean().item() for share in shares)
    return PrecisionRecall(precision, recall, num_balls / (neighbours * len(fakes)), coverage)


def _radii(features: Tensor, neighbours: int, block: int) -> Tensor:
    """Squared distance of each to its k-th nearest neighbour among the others, [N]."""
    radii = []
    for i, rows in enumerate(features.split(block)):
        nearest = rows.new_empty(len(rows), 0)
        for j, columns in enumerate(features.split(block)):
            distances, _ = _squared_distances(rows, columns)
            if i == j:
                distances.fill_diagonal_(torch.inf)
            candidates = torch.cat([nearest, distances], 1)
            nearest = candidates.topk(min(neighbours, candidates.shape[1]), largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _squared_distances(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """|x|^2 + |y|^2 - 2 x . y of every two, [N, M], and how far two ways to sum that may be apart.

    Rounding leaves equal images, and a ball's border, some 1e-13 of |x|^2 + |y|^2 off, differently in each block.
    """
    norms = first.square().sum(1)[:, None] + second.square().sum(1)
    distances = (norms - 2 * first @ second.T).clamp(min=0)
    return distances, norms * (4 * first.shape[1] * torch.finfo(norms.dtype).eps)


def frechet_interval(
    fakes: Tensor,
    reals: Gaussian,
    value: float,
    *,
    resamples: int = 100,
    seed: int,
    progress: Progress = lambda done, total: None,
) -> Interval:
    """Where the Fréchet distance lies if the generated images are drawn again: the 95% bootstrap over the fakes, with
    the reals as they are.

    Drawing with replacement leaves fewer distinct images, and fewer images lie further away, so all resampled values
    are too high (`bias`). The percentiles are therefore those of the distance to the resamples' mean, about `value`.

    With A the reals' factor and F that of the resampled fakes, the singular values of A^T F are taken as the roots of
    the eigenvalues of A^T F F^T A: faster, and what squaring costs, some 1e-8 of the largest of them, is far below the
    width of any interval.

    Args:
        fakes: Features, [N, D], N at least 2.
        value: frechet_distance of all fakes and the reals.
        seed: Of the resamples.
    """
    _require_features("fakes", fakes, least=2)
    features = _float64(fakes)
    num_images, device = len(features), features.device
    factor, mean = reals.factor.to(device), features.mean(0)
    centred = features - mean
    projected, squares = centred @ factor, centred.square().sum(1)
    offset, trace = mean - reals.mean.to(device), factor.square().sum()

    distances = np.empty(resamples)
    for number, drawn in enumerate(resampled_counts(num_images, resamples, np.random.PCG64([seed, _FRECHET]))):
        weights = torch.from_numpy(drawn).to(device, torch.float64)
        shift = weights @ centred / num_images
        variance = (weights @ squares - num_images * shift.square().sum()) / (num_images - 1)
        kept = weights.nonzero()[:, 0]
        rows = (projected[kept] - shift @ factor) * (weights[kept, None] / (num_images - 1)).sqrt()
        gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T  # the smaller one: same eigenvalues
        cross = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        distances[number] = ((offset + shift).square().sum() + variance + trace - 2 * cross).item()
        progress(number + 1, resamples)
    return interval_about(value, distances)


def score_interval(logits: Tensor, *, resamples: int = 1000, seed: int) -> Interval:
    """Where the Inception Score of one split lies if the images are drawn again: the 95% bootstrap, about the score as
    `frechet_interval` says. Fewer distinct images score less, so `bias` is below 0.

    Args:
        logits: [N, L], N at least 2; twice their size is held in float64.
        seed: Of the resamples.
    """
    _require_features("logits", logits, least=2)
    probabilities, entropies = _probabilities_and_entropies(logits)

    def scores(weights: Tensor) -> Tensor:
        marginals = torch.special.entr(weights @ probabilities / len(logits)).sum(1)
        return (marginals - weights @ entropies / len(logits)).exp()

    drawn = resampled_counts(len(logits), resamples, np.random.PCG64([seed, _SCORE]))
    blocks = iter(lambda: list(itertools.islice(drawn, 64)), [])
    values = [scores(torch.from_numpy(np.stack(block)).to(entropies)) for block in blocks]
    (value,) = scores(torch.ones_like(entropies)[None]).tolist()
    return interval_about(value, torch.cat(values).cpu().numpy())
