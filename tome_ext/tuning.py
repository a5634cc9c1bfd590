"""The search of the best merging schedule for a model and pictures of the user's."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _models, patch
from ._command import CommandError
from ._search import Budget, Counts, Search, constant
from ._version import __version__
from .bench._contenders import share_weights
from .bench._cost import count_flops
from .bench.timing import interleave, ratio
from .patch.common.class_swap import Swapped
from .patch.common.methods import Method, MethodName, make_method
from .schedule import as_integer
from .setting import Figures, Report, Setting, write_text
from .utils import _version_of

__all__ = ["tune"]

FEWEST_PICTURES = 8
MEASURE_SECONDS = 3.0  # how long speed is measured, each time
WARM_UP, FEWEST_ROUNDS = 2, 7
TIGHTENED = 8  # how often a limit of operations is lowered until a speed holds
RESAMPLES = 4000
STATE, STATE_VERSION = "tome_ext search", 1


def tune(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    flops: float | None = None,
    speed: float | None = None,
    method: MethodName = "tome",
    prop_attn: bool = True,
    normalize_fused: bool = False,
    seconds: float = 60.0,
    evaluations: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    state: str | Path | None = None,
    progress: bool | None = None,
) -> Setting:
    """Search how many tokens each layer should remove, for this model and these pictures.

    Half of the pictures choose: the search minimises how far the model's outputs on them are from
    those without merging. The other half, which the search never sees, says what that is worth
    beside the constant schedule at the same cost. If it does not show that the found schedule is
    better (a 95% interval of the ratio of the two deviations reaches 1), the constant schedule is
    returned, and ``Setting.verdict`` says so.

    The deviation of a picture is 1 - cosine of its two outputs. An output is the first tensor that
    the model returns: features or logits (B, C) as they are; of tokens (B, N, C) the class token
    or, in models without one, their mean, each as often as it counts; of maps (B, C, H, W) their
    mean; of Transformers' outputs the logits, embedding or pooled features, where there are some.
    Schedules are compared by the arithmetic mean over pictures: large deviations are those that
    change answers, and a geometric mean would trade them for small ones made smaller.

    Args:
        model: of a library that :func:`tome_ext.patch.auto` knows, and not patched. It is left as
            it is: the search runs on a copy that shares its weights, in eval mode.
        images: (P, C, H, W) floating point, at least 8, as the model takes them ((P, T, C, H, W)
            for models of videos); or an iterable of such batches, or of tuples that begin with one,
            as loaders of labelled pictures give them. They are cast to the model's dtype.
        flops: at most so many operations, over those without merging; in (0, 1). Operations are
            counted as ``tome-ext bench`` does.
        speed: or at least so fast, over the model without merging; above 1. The search is by
            operations: the schedule is measured, batch by batch in turns with the unmerged model,
            and the limit is lowered until it is as fast.
        method: "tome", "guided", "evit" or "topk"; ``prop_attn`` and ``normalize_fused`` are the
            method's: see :func:`tome_ext.patch.auto`.
        seconds: how long to search. What has been begun by then is finished, and the reporting
            pictures are run after that.
        evaluations: how many schedules to try at most, each new number of pictures counted. With
            enough seconds the result depends on this and ``seed`` alone.
        seed: of the halves, the order of the search, and the bootstrap.
        batch_size: pictures a forward, also where speed is measured.
        state: a file to write what was evaluated to, after every schedule. If it is there, the
            search goes on from it, with ``seconds`` anew, and ``evaluations`` counts those in it.
        progress: whether to show a progress bar on stderr (needs tqdm); None: if it is a terminal.

    Returns:
        What was found, for ``tome_ext.patch.auto(model, setting=...)``.

    Raises:
        ValueError: an argument is wrong; the model is not supported, or patched; fewer than 8
            pictures; outputs of a kind that can't be compared, or not finite; a limit that no
            schedule meets, or a speed that none reached; ``state`` is of another search.
        OSError: ``state`` can't be read or written.
    """
    start = time.monotonic()
    goal = _goal(flops, speed)
    _check_numbers(seconds, evaluations, batch_size)
    seed = as_integer(seed, "seed")
    options: dict[str, Any] = {"prop_attn": prop_attn, "normalize_fused": normalize_fused}
    how = make_method(method, **options)
    own = {name: value for name, value in options.items() if hasattr(how, name)}
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            raise ValueError(
                f"model: expected one that is not patched, got {name or 'one'} "
                f"({type(module).__name__}) that is; call tome_ext.patch.remove first"
            )
    pictures = _pictures(images)
    try:
        search = {
            "model": f"{type(model).__qualname__} {_digest(model.state_dict())}" if state else "",
            "pictures": _digest({"": pictures}) if state else "",
            "goal": goal,
            "method": [method, own],
            "seed": seed,
        }
        store = _Store(None if state is None else Path(state), search)
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
        choosing, reporting = order.tensor_split([len(order) // 2])
        with torch.inference_mode():
            run = _Runs(model, pictures, how, own, batch_size)
            found = _find(run, choosing, store, goal, seed, start + seconds, evaluations, progress)
            return _setting(run, reporting, goal, seed, *found)
    except CommandError as error:
        raise ValueError(str(error)) from None


# --- arguments ----------------------------------------------------------------------------------


def _goal(flops: float | None, speed: float | None) -> dict[str, float]:
    given = {"flops": flops, "speed": speed}
    goal = {name: value for name, value in given.items() if value is not None}
    if len(goal) != 1:
        raise ValueError(f"expected either flops or speed, got flops={flops!r}, speed={speed!r}")
    for name, value in goal.items():
        low, high = (0, 1) if name == "flops" else (1, math.inf)
        if not _is_number(value) or not low < value < high:
            between = "between 0 and 1" if name == "flops" else "above 1"
            raise ValueError(f"{name}: expected a number {between}, got {value!r}")
    return {name: float(value) for name, value in goal.items()}


def _check_numbers(seconds: float, evaluations: int | None, batch_size: int) -> None:
    if not _is_number(seconds) or not seconds >= 0:
        raise ValueError(f"seconds: expected a number of at least 0, got {seconds!r}")
    for name, value in {"evaluations": evaluations, "batch_size": batch_size}.items():
        if value is not None and as_integer(value, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _pictures(images: Any) -> Tensor:
    """All pictures as one tensor (P, ...)."""
    if not isinstance(images, Tensor):
        batches = []
        for batch in images:
            first = batch[0] if isinstance(batch, list | tuple) and batch else batch
            if not isinstance(first, Tensor):
                raise ValueError(f"images: expected batches of pictures, got {type(first)}")
            batches.append(first.detach().cpu())
        if len({batch.shape[1:] for batch in batches}) > 1:
            shapes = sorted({tuple(batch.shape[1:]) for batch in batches})
            raise ValueError(f"images: expected pictures of one shape, got {shapes}")
        images = torch.cat(batches) if batches else torch.empty(0, 3, 0, 0)
    if images.dim() not in (4, 5) or not images.is_floating_point():
        raise ValueError(
            "images: expected (P, C, H, W) floating point, or (P, T, C, H, W), "
            f"got {tuple(images.shape)} {images.dtype}"
        )
    if len(images) < FEWEST_PICTURES:
        raise ValueError(
            f"images: expected at least {FEWEST_PICTURES} pictures, half to choose by and half to "
            f"report on, got {len(images)}"
        )
    pictures: Tensor = images.detach()
    return pictures


def _digest(tensors: dict[str, Any]) -> str:
    """A hash of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            found.update(f"{name} {value!r}".encode())
            continue
        x = value.detach().cpu().contiguous()
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        if x.numel():
            found.update(
                (ctypes.c_char * (x.numel() * x.element_size())).from_address(x.data_ptr())
            )
    return found.hexdigest()


# --- what was evaluated -------------------------------------------------------------------------


class _Store:
    """Deviations by schedule, of the first pictures to choose by; in a file if there is one."""

    def __init__(self, path: Path | None, search: dict[str, Any]) -> None:
        self.path, self.search = path, search
        self.known: dict[Counts, list[float]] = {}
        self.left: dict[Counts, int] = {}  # that were read, and that this search has not asked for
        self.added = 0
        self.limit: float | None = None  # of operations, where the goal is a speed
        if path is None:
            return
        if not path.parent.is_dir():
            raise ValueError(f"state: can't write {path}: there is no folder {path.parent}")
        if path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind = content["format"], content["version"]
        except (ValueError, TypeError, KeyError):
            kind = None, None
        if kind != (STATE, STATE_VERSION):
            raise ValueError(
                f"state: expected {path} to be what a search has written (version "
                f"{STATE_VERSION}), or not to be there; got something else"
            )
        for name, value in self.search.items():
            if content.get(name) != value:
                raise ValueError(
                    f"state: {path} is of a search with another {name}: expected {value}, got "
                    f"{content.get(name)}; give another file, or delete it to begin anew"
                )
        self.limit = content["limit"]
        self.known = {tuple(each["r"]): each["deviations"] for each in content["evaluated"]}
        self.left = {counts: len(found) for counts, found in self.known.items()}

    def get(self, counts: Counts, number: int, run: Callable[[int], list[float]]) -> list[float]:
        """Deviations for the first pictures; ``run(first)`` gives those from ``first`` on."""
        known = self.known.get(counts, [])
        if len(known) < number:
            self.known[counts] = known + run(len(known))
            self.added += 1
            self.write()
        if self.left.get(counts, number + 1) <= number:
            del self.left[counts]
        return self.known[counts]

    def asks_for_new(self) -> bool:
        """Whether the search has come to the end of what was read."""
        return self.added > 0 or not self.left

    def write(self) -> None:
        if self.path is None:
            return
        evaluated = [{"r": list(r), "deviations": found} for r, found in self.known.items()]
        content = {
            "format": STATE,
            "version": STATE_VERSION,
            **self.search,
            "limit": self.limit,
            "evaluated": evaluated,
        }
        write_text(self.path, json.dumps(content))


# --- running the model --------------------------------------------------------------------------


class _Runs:
    """A copy of the model that shares its weights: its outputs, and what a schedule costs."""

    def __init__(
        self, model: nn.Module, pictures: Tensor, method: Method, options: Any, batch_size: int
    ) -> None:
        self.pictures, self.method, self.batch_size = pictures, method, batch_size
        self.options = options
        self.model = _copy(model)
        self.class_name = type(model).__qualname__
        weight = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.device = pictures.device if weight is None else weight.device
        self.dtype = pictures.dtype if weight is None else weight.dtype
        layout = _models.layout(
            _models.Model(self.class_name, self.model, tuple(pictures.shape[1:]))
        )
        self.tokens, self.layers = layout.tokens, len(layout.tower.blocks)
        self.prefix, self.class_token = layout.prefix, layout.tower.class_token
        self.package = type(layout.tower.module).__module__.partition(".")[0]
        self.unmerged = self.outputs(None, torch.arange(len(pictures)))
        self.one = self.batch(torch.arange(1))
        self.all_flops = count_flops(lambda: self.model(self.one))
        self.plain = share_weights(self.model)
        try:
            patch.auto(self.model, method=method.name, inference=True, **options)
        except ImportError as error:
            raise ValueError(str(error)) from None
        self.flops = _Operations(self)

    def batch(self, which: Tensor) -> Tensor:
        """Pictures as the model takes them."""
        return self.pictures[which.to(self.pictures.device)].to(self.device, self.dtype)

    def outputs(self, counts: Counts | None, which: Tensor) -> Tensor:
        """Outputs (P, C) float64 for some pictures; None: of the model before it is patched."""
        if counts is not None:
            self.model.r = list(counts)
        found = []
        for part in which.split(self.batch_size):
            out = self.pooled(self.model(self.batch(part)))
            found.append(out.cpu().double())
        out = torch.cat(found)
        if not out.isfinite().all():
            name = "the unmerged model" if counts is None else f"the model with r = {list(counts)}"
            raise ValueError(f"NaN or infinite output of {name}")
        return out

    def pooled(self, out: Any) -> Tensor:
        """One vector (B, C) for each picture, of what the model returns."""
        found = out
        for name in ("logits", "image_embeds", "pooler_output"):
            if getattr(out, name, None) is not None:
                found = getattr(out, name)
                break
        while not isinstance(found, Tensor):
            parts = list(found.values()) if hasattr(found, "values") else found
            if not isinstance(parts, list | tuple) or not parts:
                raise ValueError(f"model: expected it to return tensors, got {type(out)}")
            found = parts[0]
        if found.dim() == 2:
            return found
        if found.dim() == 3 and self.class_token:
            return found[:, 0]
        if found.dim() == 3:
            tokens = getattr(self.model, "tome", None)
            whole = tokens.unmerge(found) if tokens is not None and tokens.fit(found) else found
            return whole.mean(1)
        if found.dim() == 4:
            return found.mean((2, 3))
        raise ValueError(
            f"model: expected outputs (B, C), (B, N, C) or (B, C, H, W), got {tuple(found.shape)}"
        )

    def deviations(self, counts: Counts, which: Tensor) -> list[float]:
        """1 - cosine to the unmerged outputs, for some pictures."""
        out = self.outputs(counts, which)
        cosines = F.cosine_similarity(out, self.unmerged[which], dim=1)
        deviations: list[float] = (1 - cosines).clamp_min(0).tolist()
        return deviations

    def cut(self, counts: Counts) -> Counts:
        """The tokens that layers really remove."""
        found, tokens = [], self.tokens
        for r in counts:
            left = self.method.tokens_after(tokens, self.prefix, r, None)
            found.append(tokens - left)
            tokens = left
        return tuple(found)

    def speeds(self, schedules: Sequence[Counts]) -> list[float]:
        """Measured speeds over the unmerged model's, all taking turns."""
        x = self.batch(torch.arange(min(self.batch_size, len(self.pictures))))
        contenders: dict[str, Any] = {"unmerged": lambda: self.plain(x)}
        for i, counts in enumerate(schedules):
            fast = share_weights(self.plain)
            patch.auto(fast, list(counts), method=self.method.name, inference=True, **self.options)
            contenders[str(i)] = lambda fast=fast: fast(x)
        times = interleave(contenders, MEASURE_SECONDS, self.device, WARM_UP, FEWEST_ROUNDS)
        return [ratio(times, "unmerged", str(i)) for i in range(len(schedules))]


def _copy(model: nn.Module) -> Any:
    """A copy for inference that shares the model's weights, whose own flags stay as they are."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    # torch's counter of operations can't follow parameters that want gradients.
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False)
    return copy.deepcopy(model, memo).eval()


class _Operations:
    """Operations of a schedule over those of the unmerged model.

    Counting takes a forward. In most models the count is the same sum for every block, of terms in
    the tokens before and after it; where a fit of some counts gives all of them exactly, it
    serves for the others.
    """

    def __init__(self, run: _Runs) -> None:
        self.run = run
        self.known: dict[Counts, float] = {}  # counted
        self.fitted: dict[Counts, float] = {}
        rng = random.Random(0)
        most = max(3 * run.tokens // (2 * run.layers), 1)
        samples = [(0,) * run.layers]
        while len(samples) < 14:
            drawn = (rng.randint(0, most) * (rng.random() < 0.75) for _ in range(run.layers))
            samples.append(run.cut(tuple(drawn)))
        terms = torch.tensor([self.terms(each) for each in samples], dtype=torch.float64)
        counted = torch.tensor([self.counted(each) for each in samples], dtype=torch.float64)
        scale = terms.amax(0).clamp_min(1)
        fit = torch.linalg.lstsq(terms / scale, counted.unsqueeze(1), driver="gelsd")
        weights = fit.solution.squeeze(1) / scale
        self.weights: list[float] = weights.tolist()
        self.exact = bool(((terms @ weights - counted).abs() < 1e-7).all())

    def terms(self, counts: Counts) -> list[float]:
        tokens = self.run.tokens
        sums = [0.0] * 6
        for r in counts:
            left = self.run.method.tokens_after(tokens, self.run.prefix, r, None)
            free = tokens - self.run.prefix
            reduces = float(r > 0)
            matched = reduces * (free // 2) * (free - free // 2)
            new = tokens, tokens**2, left, reduces, reduces * tokens, matched
            sums = [a + b for a, b in zip(sums, new, strict=True)]
            tokens = left
        return [1.0, tokens, *sums]

    def counted(self, counts: Counts) -> float:
        """As torch's counter says, in a forward of one picture."""
        if counts not in self.known:
            self.run.model.r = list(counts)
            flops = count_flops(lambda: self.run.model(self.run.one))
            self.known[counts] = flops / self.run.all_flops
        return self.known[counts]

    def __call__(self, counts: Counts) -> float:
        if not self.exact:
            return self.counted(counts)
        if counts not in self.fitted:
            terms = zip(self.weights, self.terms(counts), strict=True)
            self.fitted[counts] = sum(weight * term for weight, term in terms)
        return self.fitted[counts]


# --- the search ---------------------------------------------------------------------------------


def _find(
    run: _Runs,
    choosing: Tensor,
    store: _Store,
    goal: dict[str, float],
    seed: int,
    deadline: float,
    evaluations: int | None,
    progress: bool | None,
) -> tuple[Counts, Counts, list[float] | None]:
    """The found schedule, the constant one, and the speeds of both where the goal is one."""

    def deviations(counts: Counts, number: int) -> list[float]:
        return store.get(counts, number, lambda at: run.deviations(counts, choosing[at:number]))

    with ExitStack() as stack:
        show = _Bar(stack, deadline, evaluations, progress)
        search = Search(
            *(run.layers, len(choosing), deviations),
            lambda: time.monotonic() >= deadline and store.asks_for_new(),
            *(evaluations, seed, show),
        )
        least = run.flops(run.cut((run.tokens,) * run.layers))
        if "flops" in goal:
            limit = goal["flops"]
            if least > limit:
                raise ValueError(
                    f"flops: expected at least {math.ceil(least * 1000) / 1000}, which is what "
                    f"{run.method.name} reaches in this model, got {limit}"
                )
            return *search.run(Budget(run.cut, run.flops, limit)), None
        return _fast_enough(run, search, store, goal["speed"], least)


def _fast_enough(
    run: _Runs, search: Search, store: _Store, speed: float, least: float
) -> tuple[Counts, Counts, list[float]]:
    """The search at the highest limit of operations found that leads to a speed."""
    limit = max(store.limit or min(1.1 / speed, 0.98), least)
    more: list[Sequence[float]] = []
    reached = 0.0
    for _ in range(TIGHTENED):
        budget = Budget(run.cut, run.flops, limit)
        flat = budget.meet(constant(run.layers))
        assert flat is not None  # as the limit can be met
        reached = min(run.speeds([flat]))
        if reached >= speed:
            found, flat = search.run(budget, more)
            speeds = run.speeds([found, flat])
            reached = min(speeds)
            if reached >= speed:
                return found, flat, speeds
            more = [found]
        if limit == least:
            break
        limit = max(0.98 * limit * reached / speed, least)
        store.limit = limit
        store.write()
    raise ValueError(
        f"speed: expected {speed} times that of the unmerged model, reached {reached:.2f} times "
        f"with batches of {min(run.batch_size, len(run.pictures))} on {run.device}; expect less, "
        "or try larger batches"
    )


class _Bar:
    """A progress bar on stderr, if there shall be one."""

    def __init__(
        self, stack: ExitStack, deadline: float, evaluations: int | None, wanted: bool | None
    ) -> None:
        self.start, self.deadline, self.most = time.monotonic(), deadline, evaluations
        self.bar: Any = None
        if wanted is None:
            wanted = sys.stderr.isatty() and find_spec("tqdm") is not None
        if wanted:
            from tqdm import tqdm

            form = "{percentage:3.0f}%|{bar}| {elapsed} {desc}"
            self.bar = stack.enter_context(tqdm(total=1.0, bar_format=form))

    def __call__(self, tried: int, best: float, flat: float) -> None:
        if self.bar is None:
            return
        share = (time.monotonic() - self.start) / max(self.deadline - self.start, 1e-9)
        share = max(share, tried / self.most if self.most else 0.0)
        self.bar.set_description_str(
            f"{tried} tried, deviation {best:.3g}, of the constant schedule {flat:.3g}", False
        )
        self.bar.update(min(share, 1.0) - self.bar.n)


# --- the report ---------------------------------------------------------------------------------


def _setting(
    run: _Runs,
    reporting: Tensor,
    goal: dict[str, float],
    seed: int,
    found: Counts,
    flat: Counts,
    speeds: list[float] | None,
) -> Setting:
    """The report on the other pictures, and the schedule that it speaks for."""
    of_found, of_flat = (run.deviations(counts, reporting) for counts in (found, flat))
    value, low, high = _ratio(of_found, of_flat, seed)
    flops = [run.flops.counted(counts) for counts in (found, flat)]
    better = found != flat and high < 1
    chosen = 0 if better else 1
    report = Report(
        pictures=len(reporting),
        found=list(found),
        constant=list(flat),
        found_deviation=_figures(of_found),
        constant_deviation=_figures(of_flat),
        found_flops=flops[0],
        constant_flops=flops[1],
        found_speed=None if speeds is None else speeds[0],
        constant_speed=None if speeds is None else speeds[1],
        ratio=value,
        low=low,
        high=high,
        better=better,
    )
    packages = {"torch": torch.__version__, run.package: _version_of(run.package)}
    return Setting(
        method=run.method.name,
        r=list((found, flat)[chosen]),
        options=dict(run.options),
        model=run.class_name,
        layers=run.layers,
        tokens=run.tokens,
        image_size=[int(side) for side in run.pictures.shape[-2:]],
        goal=goal,
        flops=flops[chosen],
        speed=None if speeds is None else speeds[chosen],
        report=report,
        versions={"tome_ext": __version__, **packages},
    )


def _figures(deviations: list[float]) -> Figures:
    values = torch.tensor(deviations, dtype=torch.float64)
    return Figures(
        float(values.mean()), statistics.median(deviations), float(values.quantile(0.95))
    )


def _ratio(found: list[float], flat: list[float], seed: int) -> tuple[float, float, float]:
    """The ratio of two means over the same pictures, and its 95% interval.

    The interval is by bootstrap. Of few pictures that is too narrow, so it is at least as wide as
    Student's t makes it of the ratio's standard error, and reaches 1 where Student's paired test
    finds no difference.
    """
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (found, flat))
    if not b.sum() > 0:  # the constant schedule changes nothing
        return 1.0, 1.0, 1.0
    number = len(a)
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(number, (number,), generator=generator) for _ in range(RESAMPLES))
    sums = torch.stack([torch.stack((a[which].sum(), b[which].sum())) for which in drawn])
    ratios = sums[:, 0] / sums[:, 1].clamp_min(1e-300)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value = float(a.sum() / b.sum())
    times = _student(number - 1) / math.sqrt(number)
    reach = times * float((a - value * b).std() / b.mean())
    low, high = min(low, max(value - reach, 0.0)), max(high, value + reach)
    if abs(float((a - b).mean())) <= times * float((a - b).std()):
        low, high = min(low, 1.0), max(high, 1.0)
    return value, low, high


def _student(freedom: int) -> float:
    """The 97.5th percentile of Student's t, to 1% from three degrees of freedom on."""
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
