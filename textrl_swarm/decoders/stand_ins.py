"""Functions in the place of a decoder's blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.errors import ModelError

Replacement: TypeAlias = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]

# What decoders of transformers take for a block's answer.
_FORMS: dict[str, Callable[[Tensor, object], Any]] = {
    "a tensor": lambda hidden, _: hidden,
    "a tuple": lambda hidden, _: (hidden,),
    "a pair": lambda hidden, second: (hidden, second),
}


class StandIns:
    """Replaces every block of a skeleton.

    Args:
        skeleton: whose list of blocks is changed.
        replacement: called with a block's index, hidden states, and other arguments; returns hidden states.
    """

    def __init__(self, skeleton: Skeleton, replacement: Replacement):
        self.replacement = replacement
        self.second: object = None  # of a pair
        self.form = _FORMS["a tensor"]
        for i, block in enumerate(skeleton.blocks):
            skeleton.blocks[i] = _StandIn(self, i, block)

    def choose_form(self, attempt: Callable[[], bool]) -> str | None:
        """Finds the form of answers with which `attempt` returns True; else says why there is none.

        A ModelError of the attempt is the reason; a decoder that is handed the wrong form fails in other
        ways.
        """
        reason = failure = None
        for what, self.form in _FORMS.items():
            try:
                if attempt():
                    return None
            except ModelError as error:
                reason = reason or str(error)
            except Exception as error:
                failure = failure or f"its decoder fails with {what} for a block's answer: {error!r}"
        return reason or failure or "what its blocks hand on is no hidden state"


class _StandIn(nn.Module):
    def __init__(self, owner: StandIns, index: int, block: nn.Module):
        super().__init__()
        self._owner, self._index = owner, index
        for name, value in vars(block).items():  # attention_type, layer_type: decoders read them
            is_plain = isinstance(value, (str, int, bool, float))
            if is_plain and not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        answer = self._owner.replacement(self._index, hidden, args[1:], kwargs)
        return self._owner.form(answer, self._owner.second)
