"""The search of a schedule: which shapes, how they meet a limit, which are better. Knows no models.

A schedule is a tuple of whole numbers, the tokens that each layer removes. What it costs and how
far outputs are off with it is asked of functions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Budget", "Counts", "Search", "constant", "shapes"]

Counts = tuple[int, ...]

# Bumps: centres and widths in layers of twelve. On a trained CLIP ViT-B/16 at r = 8, centre 6 and
# width 2.5 had half the deviation of the constant schedule; at r = 16 a third more.
CENTRES = (3, 4, 5, 6, 7, 8)
WIDTHS = (1.5, 2.5, 4)
INFLECTIONS = (-1, -0.5, 0.5, 1)
FEWEST = 8  # pictures that a schedule is first tried on, or an eighth of them if that is more
BISECTIONS = 40


def constant(layers: int) -> list[float]:
    """The same in every layer."""
    return [1.0] * layers


def shapes(layers: int) -> list[list[float]]:
    """Schedules to begin with, up to a factor: the constant, linear ones, bumps."""
    found = [constant(layers)]
    last = max(layers - 1, 1)
    for inflection in INFLECTIONS:
        found.append([1 - inflection + 2 * inflection * layer / last for layer in range(layers)])
    for centre in CENTRES:
        for width in WIDTHS:
            middle, spread = centre * layers / 12, width * layers / 12
            found.append(
                [math.exp(-0.5 * ((layer - middle) / spread) ** 2) for layer in range(layers)]
            )
    return found


@dataclass(frozen=True)
class Budget:
    """What a schedule may cost.

    Attributes:
        cut: a schedule as it comes out, where layers have fewer tokens than it would remove.
        cost: of a schedule that is cut; the more it removes, the less.
        limit: what it may cost at most.
    """

    cut: Callable[[Counts], Counts]
    cost: Callable[[Counts], float]
    limit: float

    def meet(self, shape: Sequence[float]) -> Counts | None:
        """The shape times a factor, in whole numbers, so that it just meets the limit.

        The factor is the smallest that does. As many numbers are rounded at once, each layer may
        then keep a token more, if that meets the limit too; those that were rounded up furthest are
        asked first. None if no factor meets the limit.
        """
        if not any(weight > 0 for weight in shape):
            return None

        def scaled(factor: float) -> Counts:
            return self.cut(tuple(int(factor * weight + 0.5) for weight in shape))

        high = 1.0
        while self.cost(scaled(high)) > self.limit:
            high *= 2
            if high > 1e9:
                return None
        low = 0.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self.cost(scaled(middle)) > self.limit:
                low = middle
            else:
                high = middle
        counts = scaled(high)
        order = sorted(range(len(shape)), key=lambda layer: high * shape[layer] - counts[layer])
        for layer in order:
            fewer = list(counts)
            fewer[layer] -= 1
            if fewer[layer] >= 0 and self.cost(self.cut(tuple(fewer))) <= self.limit:
                counts = self.cut(tuple(fewer))
        return counts


class Search:
    """The best schedule within a budget.

    First successive halving: all shapes on a few pictures, the better half of them on twice as
    many, and so on. Then local search from the best: some tokens of one layer are removed in
    another instead, and the whole is made to meet the budget again. What is worse on a few pictures
    is not tried on more.

    Args:
        layers: of the model.
        pictures: how many there are to choose by.
        deviations: ``deviations(counts, number)`` says how far outputs are off, for each of the
            first ``number`` pictures.
        spent: whether time is up; asked before each schedule, which is then finished.
        evaluations: how often ``deviations`` may be asked for pictures it has not been asked for.
        seed: of the order in which neighbours are tried.
        on_progress: called after each schedule, with how many were tried, the mean deviation of the
            best so far, and that of the constant one.
    """

    def __init__(
        self,
        layers: int,
        pictures: int,
        deviations: Callable[[Counts, int], Sequence[float]],
        spent: Callable[[], bool],
        evaluations: int | None,
        seed: int,
        on_progress: Callable[[int, float, float], object] = lambda *_: None,
    ) -> None:
        self.layers, self.pictures = layers, pictures
        self.deviations, self.spent, self.on_progress = deviations, spent, on_progress
        self.most, self.evaluations = evaluations, 0
        self.seed = seed
        self.seen: dict[Counts, int] = {}  # on how many pictures
        self.best_mean = self.constant_mean = math.nan

    def run(self, budget: Budget, more: Iterable[Sequence[float]] = ()) -> tuple[Counts, Counts]:
        """The best schedule and the constant one, both within the budget.

        On all pictures the best is at least as good as the constant one. ``more`` are shapes that
        are tried before all others.

        Raises:
            ValueError: no schedule meets the budget.
        """
        flat = budget.meet(constant(self.layers))
        if flat is None:
            raise ValueError("no schedule meets the budget")
        self.constant_mean = self.best_mean = self.mean(flat, self.pictures)
        self.on_progress(self.evaluations, self.best_mean, self.constant_mean)
        met = (budget.meet(shape) for shape in [*more, *shapes(self.layers)])
        pool = list(dict.fromkeys(counts for counts in met if counts is not None))
        best = self.halve(pool)
        # The one that the halving ended with is finished, also when there is no time left.
        if self.mean(best, self.pictures) >= self.constant_mean:
            best = flat
        self.best_mean = self.mean(best, self.pictures)
        return self.improve(best, budget), flat

    def mean(self, counts: Counts, number: int) -> float:
        """The mean deviation over the first pictures."""
        if self.seen.get(counts, 0) < number:
            self.evaluations += 1
            self.seen[counts] = number
        return math.fsum(self.deviations(counts, number)[:number]) / number

    def over(self) -> bool:
        """Whether no further schedule may be begun."""
        return (self.most is not None and self.evaluations >= self.most) or self.spent()

    def sizes(self) -> list[int]:
        """Numbers of pictures to try a schedule on, one after the other."""
        size = max(FEWEST, -(-self.pictures // 8))
        found = []
        while size < self.pictures:
            found.append(size)
            size *= 2
        return [*found, self.pictures]

    def halve(self, pool: list[Counts]) -> Counts:
        """The best of a pool, whose worse half is left out at each number of pictures."""
        for number in self.sizes():
            tried: list[tuple[float, Counts]] = []
            for counts in pool:
                if tried and self.over():
                    break
                tried.append((self.mean(counts, number), counts))
                if number == self.pictures:
                    self.best_mean = min(self.best_mean, tried[-1][0])
                self.on_progress(self.evaluations, self.best_mean, self.constant_mean)
            tried.sort()
            pool = [counts for _, counts in tried[: -(-len(tried) // 2)]]
            if self.over():
                break
        return pool[0]

    def improve(self, best: Counts, budget: Budget) -> Counts:
        """Local search from a schedule."""
        rng = random.Random(self.seed)
        tried = {best}
        step = max(1, max(best) // 2)
        pairs = [(i, j) for i in range(self.layers) for j in range(self.layers) if i != j]
        while True:
            rng.shuffle(pairs)
            improved = False
            for source, target in pairs:
                if self.over():
                    return best
                moved = min(step, best[source])
                shape = [float(count) for count in best]
                shape[source] -= moved
                shape[target] += moved
                counts = budget.meet(shape) if moved else None
                if counts is None or counts in tried:
                    continue
                tried.add(counts)
                if self.beats(counts, best):
                    best, improved = counts, True
                    self.best_mean = self.mean(best, self.pictures)
                self.on_progress(self.evaluations, self.best_mean, self.constant_mean)
            if not improved and step == 1:
                return best
            step = step if improved else step // 2

    def beats(self, counts: Counts, best: Counts) -> bool:
        """Whether a schedule is better on all pictures, given up as soon as it is worse on some."""
        return all(self.mean(counts, number) < self.mean(best, number) for number in self.sizes())
