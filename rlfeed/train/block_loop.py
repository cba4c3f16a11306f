"""The loop of agents that learn from what one policy has just done, a block of steps at a time.

Rollout.blocks ──► pinned ──► device ──► agent.learn, which goes over the block as often as it likes
"""

from dataclasses import dataclass
from typing import Any

from rlfeed.rollout import Rollout
from rlfeed.train.agent import BlockAgent
from rlfeed.train.collectors import Collector, RolloutBlocks
from rlfeed.train.loop import Loop, LoopConfig


@dataclass(frozen=True, kw_only=True)
class BlockLoopConfig(LoopConfig):
    """Say how much is learned from at a time.

    Args:
        block_length: Steps of each environment in a block.
    """

    block_length: int = 128


class BlockLoop(Loop):
    """Train an agent from blocks.

    Schedules count the steps before a block: the last one is learned from with what is left of them. A run is stopped
    and saved between blocks, never in one.

    Args:
        config: How long, how often, how many.
        agent: What learns.
        source: What collects: a rollout with the agent's policy, or another collector of blocks.
        **rest: As `Loop` has them.
    """

    config: BlockLoopConfig
    agent: BlockAgent

    def __init__(self, config: BlockLoopConfig, agent: BlockAgent, source: Rollout | Collector, **rest: Any) -> None:
        collector = RolloutBlocks(source, config.block_length) if isinstance(source, Rollout) else source
        super().__init__(config, agent, collector, **rest)

    def collect(self) -> None:
        """Take a block and learn from it: a run is never saved between the two; see `Loop`."""
        before = self.env_steps
        block = self.collector.collect()
        if block is None:
            return
        if self.device.type != "cpu":
            block = block.pin_memory().to(self.device, non_blocking=True)
        self._learn(block, before)
