"""``model._tome_info``: what the published patch keeps there, for code that reads or sets it."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from typing import Any

import torch

from .methods import ToMe
from .refusals import check_bool
from .rules import make_rules
from .trail import Trail

__all__ = ["PublishedInfo", "change_settings"]

OF_SETTINGS = ("r", "size", "source", "trace_source", "prop_attn")
OF_MODEL = ("class_token", "distill_token")


def change_settings(trail: Trail, **changes: Any) -> None:
    """Replace some of the settings of a patched tower.

    Raises:
        ValueError: one is wrong. Nothing is changed.
    """
    rules = trail.rules
    if "r" in changes:  # of the user's own, whatever it was found for before
        changes["for_tokens"] = None
    settings = replace(rules.settings, **changes)
    trail.rules = make_rules(settings, len(rules.layers), rules.num_prefix_tokens)


class PublishedInfo(MutableMapping[str, Any]):
    """A view of a patched model with the keys of the published patch. Copies are plain dicts.

    "r" is a list with one number per layer, "size" (B, M, 1) in the dtype of the model's weights,
    "source" (B, M, N) float32 if "trace_source", "prop_attn", "class_token" and "distill_token" are
    bools. Writing "r", "prop_attn" and "trace_source" takes effect with the next forward; None as
    "size" or "source" forgets the last forward; other keys are kept for whoever reads them.
    """

    def __init__(self, model: Any, trail: Trail, extra: dict[str, Any]) -> None:
        self._model, self._trail, self._extra = model, trail, extra

    def __getitem__(self, key: str) -> Any:
        tokens, rules = self._trail.current, self._trail.rules
        if key == "r":
            return [rule.r for rule in rules.layers]
        if key == "trace_source":
            return rules.settings.trace_source
        if key == "prop_attn":
            return rules.method.proportional
        if key == "size":
            if tokens is None or tokens.size is None:
                return None
            weights = (p.dtype for p in self._model.parameters() if p.is_floating_point())
            return tokens.size.unsqueeze(-1).to(next(weights, torch.float32))
        if key == "source":
            plan = tokens.plan if rules.settings.trace_source and tokens is not None else None
            if plan is None:
                return None
            rows = torch.arange(plan.num_output_tokens, device=plan.assign.device)
            return (plan.assign.unsqueeze(1) == rows[:, None]).to(torch.float32)
        return self._extra[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "r":
            change_settings(self._trail, r=value, keep_rate=None, threshold=None)
        elif key == "trace_source":
            check_bool(value, "_tome_info['trace_source']")
            change_settings(self._trail, trace_source=value)
        elif key == "prop_attn":
            method = self._trail.rules.method
            if not isinstance(method, ToMe):
                raise ValueError(
                    f"_tome_info['prop_attn']: {method.name!r} has no sizes to attend by; expected "
                    "a model that was patched with method='tome'"
                )
            check_bool(value, "_tome_info['prop_attn']")
            change_settings(self._trail, method=replace(method, prop_attn=value))
        elif key in ("size", "source"):
            if value is not None:
                raise ValueError(
                    f"_tome_info[{key!r}]: expected None, as each forward makes its own; to begin "
                    "with other sizes, merge in blocks of your own: MergePlan.merge(x, size) of "
                    "tome_ext.match, or the published project's ToMeBlock and make_tome_class "
                    "from tome_ext.published.patch.timm"
                )
            self._trail.forget()
        elif key in OF_MODEL:
            if value != self[key]:
                raise ValueError(
                    f"_tome_info[{key!r}]: expected {self[key]}, which the model says, got "
                    f"{value!r}; which tokens never merge is an argument of tome_ext.match"
                )
        else:
            self._extra[key] = value

    def __delitem__(self, key: str) -> None:
        if key in OF_SETTINGS + OF_MODEL:
            raise TypeError(f"_tome_info: {key!r} cannot be deleted, only read or set")
        del self._extra[key]

    def __iter__(self) -> Iterator[str]:
        yield from OF_SETTINGS
        yield from self._extra

    def __len__(self) -> int:
        return len(OF_SETTINGS) + len(self._extra)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:
        return dict, (dict(self),)
