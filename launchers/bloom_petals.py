r"""PPO of BLOOM-176B through a swarm: `private_swarm.py` with BLOOM for its model.

What it does    what launchers/private_swarm.py does: the plan, the commands, the training.
What it needs   servers for 70 blocks (6 GPUs of 24 GB in 4 bits, say) on Linux machines that can reach each
                other, and for the trainer any machine with about 12 GB of memory; no GPU.

    python launchers/bloom_petals.py                            # the plan, and how to start servers
    python launchers/bloom_petals.py --initial-peers ADDRESS    # train
    textrl-swarm export runs/bloom-176b bloom-adapter           # the adapter, for transformers + peft
    python launchers/bloom_petals.py --tiny                     # all of it with a toy, on this machine
"""

from __future__ import annotations

import sys

from private_swarm import main

from textrl_swarm.errors import TextRLSwarmError

if __name__ == "__main__":
    try:
        sys.exit(main("bloom-176b", __doc__))
    except TextRLSwarmError as error:
        sys.exit(f"error: {error}")
