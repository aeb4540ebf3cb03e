"""The only imports of pfrl and gym, which prints on import that it is unmaintained."""

from __future__ import annotations

import contextlib
import io

with contextlib.redirect_stderr(io.StringIO()):
    from gym.spaces import Discrete as Discrete
    from pfrl.agent import BatchAgent as BatchAgent
    from pfrl.experiments.evaluator import Evaluator as Evaluator
    from pfrl.experiments.evaluator import save_agent as save_agent
