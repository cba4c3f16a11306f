"""Every TensorBoard tag: its name, its unit, what it means, when it is bad and what to do then.

This is the only table. ``docs/metrics.md`` is generated from it, and a logger refuses a tag that is not in it or was
not declared with `register`. The x-axis of every curve is env_steps. Names are those that Stable-Baselines3 gives the
same quantity; the ``charts`` group has CleanRL's names, so that curves of either lie over ours.
"""

import re
from dataclasses import dataclass

from rlfeed.errors import ConfigError, TagError, suggest

_NAME = re.compile(r"[a-z0-9_]+(/[A-Za-z0-9_.-]+)+")


@dataclass(frozen=True, slots=True)
class Tag:
    """Describe one curve.

    Args:
        name: ``group/quantity``.
        unit: What the values count or measure.
        meaning: One sentence.
        bad: What a problem looks like in this curve.
        remedy: What to do then.
    """

    name: str
    unit: str
    meaning: str
    bad: str = ""
    remedy: str = ""


TAGS: dict[str, Tag] = {
    tag.name: tag
    for tag in (
        Tag(
            "actors/policy_lag",
            "updates",
            "Updates between the weights that were published last and those that an actor acts with, mean over actors.",
            "Grows while the run goes on.",
            "Actors seldom look for new weights: lower pull_every; or one hangs: see actors/steps_per_s.",
        ),
        Tag(
            "actors/restarts",
            "1",
            "Actors that died and were started again, since the start.",
            "Grows.",
            "The warnings say what they died of.",
        ),
        Tag(
            "actors/waited",
            "fraction",
            "Part of the time in which actors waited for the learner, mean over actors.",
            "Near 1: they could step far more.",
            "The learner is the slow side: fewer actors will do, or raise actors_ahead and accept older policies.",
        ),
        Tag(
            "charts/SPS",
            "env steps / s",
            "Environment steps per second since the start, learning included.",
            "Falls while the run goes on.",
            "See feed/wait_ms and time/updates_per_s for the side that slowed down.",
        ),
        Tag(
            "charts/episodic_length",
            "steps",
            "Length of one training episode, at the step where it ended.",
            "Stays at the time limit where shorter is better.",
            "Check the reward and the exploration.",
        ),
        Tag(
            "charts/episodic_return",
            "reward",
            "Undiscounted return of one training episode, at the step where it ended.",
            "Flat at the return of random actions.",
            "Check that the reward is reachable; explore for longer.",
        ),
        Tag(
            "eval/mean_ep_length",
            "steps",
            "Mean length of the episodes of one evaluation.",
            "Differs much from rollout/ep_len_mean late in the run.",
            "Compare the wrappers of the training and the evaluation environments.",
        ),
        Tag(
            "eval/mean_reward",
            "reward",
            "Mean undiscounted return of one evaluation: greedy actions, separate environments, own seeds.",
            "Well below rollout/ep_rew_mean.",
            "The greedy policy is stuck where exploration is not: train longer or evaluate more episodes.",
        ),
        Tag(
            "eval/success_rate",
            "1",
            "Mean of what infos told of success (is_success) at the ends of one evaluation's episodes.",
            "Falls while eval/mean_reward rises.",
            "The reward pays for something else than success: look at its parts.",
        ),
        Tag(
            "feed/wait_ms",
            "ms",
            "Mean time for which the learner waited for a batch.",
            "Of the order of an update.",
            "Use more workers, a larger batch or a cheaper transform.",
        ),
        Tag(
            "replay/policy_lag",
            "updates",
            "Updates made since those of the weights that chose the sampled steps, mean over batches; with actors.",
            "Grows without end: the capacity, not the actors, decides it once the replay is full.",
            "Lower the capacity or the updates per env step where the agent does not bear old steps.",
        ),
        Tag(
            "replay/ratio",
            "samples / step",
            "Sampled steps per inserted step since the start.",
            "Far from the ratio that was configured.",
            "The learner or the rollout is waiting: see feed/wait_ms and time/fps.",
        ),
        Tag(
            "replay/size",
            "steps",
            "Steps in the buffer that can be sampled.",
            "Stops far below its capacity.",
            "Short episodes spend rows on their ends: raise the capacity.",
        ),
        Tag(
            "rollout/ep_len_mean",
            "steps",
            "Mean length of the last 100 training episodes.",
            "Stays at the time limit where shorter is better.",
            "Check the reward and the exploration.",
        ),
        Tag(
            "rollout/ep_rew_mean",
            "reward",
            "Mean undiscounted return of the last 100 training episodes.",
            "Rises, then collapses for good.",
            "Lower the learning rate or update the target network less often.",
        ),
        Tag(
            "rollout/exploration_rate",
            "probability",
            "Probability of a random action while collecting.",
            "Reaches its final value before the return has begun to rise.",
            "Explore for a larger part of the run.",
        ),
        Tag(
            "rollout/lost",
            "steps",
            "Steps that were lost since the start because an environment broke; no curve while none was.",
            "Grows with env steps.",
            "The warnings name the environment and what it did; python scripts/check_env.py looks for more.",
        ),
        Tag(
            "rollout/success_rate",
            "1",
            "Mean of what infos told of success (is_success), over the last 100 training episodes.",
            "Falls while rollout/ep_rew_mean rises.",
            "The reward pays for something else than success: look at its parts.",
        ),
        Tag(
            "time/environments_fps",
            "env steps / s",
            "Environment steps per second of the time that the environments themselves took, since the last value.",
            "Not far above time/fps: the environments are what the run waits for.",
            "Step them in several processes (mode='pool'), or use actors.",
        ),
        Tag(
            "time/fps",
            "env steps / s",
            "Environment steps per second since the last value, learning included.",
            "Falls while the run goes on.",
            "See feed/wait_ms and time/updates_per_s for the side that slowed down.",
        ),
        Tag(
            "time/policy_fps",
            "env steps / s",
            "Environment steps per second of the time in which actions were decided, since the last value.",
            "Not far above time/fps: acting is what the run waits for.",
            "Step more environments at once, or act with a smaller network.",
        ),
        Tag(
            "time/rest_fps",
            "env steps / s",
            "Environment steps per second of all other time: storing, learning, logging, since the last value.",
            "Not far above time/fps: the learner is what the run waits for.",
            "See feed/wait_ms and time/updates_per_s.",
        ),
        Tag(
            "time/updates_per_s",
            "updates / s",
            "Optimiser steps per second since the last value.",
            "Falls while feed/wait_ms is small.",
            "The learner itself is slow: use another device, a smaller network or a larger batch.",
        ),
        Tag(
            "train/actor_loss",
            "reward",
            "Loss of the actor: the temperature times its log-density, less the value of its actions.",
            "Rises while the return falls.",
            "Lower the learning rate; see train/q_mean for values that chase themselves.",
        ),
        Tag(
            "train/approx_kl",
            "nats",
            "How far an update's policy is from the one that took the steps, estimated from them, mean.",
            "Above 0.05 for long: the steps no longer tell about the policy.",
            "Lower the learning rate, epochs or clip; or set target_kl.",
        ),
        Tag(
            "train/clip_fraction",
            "fraction",
            "Part of the steps whose ratio of probabilities has left the clip range.",
            "Above 0.3, or 0 while the return does not rise.",
            "Lower the learning rate or epochs where it is high; raise them where it is 0.",
        ),
        Tag(
            "train/clip_range",
            "1",
            "How far the ratio of probabilities may move from 1.",
            "Is not what the schedule says.",
            "Compare with the run's config.json.",
        ),
        Tag(
            "train/critic_loss",
            "loss",
            "Loss of the critics, summed over them.",
            "Grows without end; a small steady rise is normal while returns grow.",
            "Lower the learning rate, scale the rewards.",
        ),
        Tag(
            "train/ent_coef",
            "reward / nat",
            "Temperature: what a nat of entropy is worth to the actor.",
            "Falls to nothing before the return has begun to rise, or grows without end.",
            "Raise the target entropy, or correlate the noise; where it grows, the actor is stuck at its bounds.",
        ),
        Tag(
            "train/ent_coef_loss",
            "loss",
            "Loss of the temperature; 0 where the entropy is the one that is aimed at.",
            "Stays far from 0.",
            "The temperature cannot follow: raise the learning rate or the temperature it begins with.",
        ),
        Tag(
            "train/entropy_loss",
            "nats",
            "The entropy of actions, negative, mean.",
            "Near 0 before the return has risen: exploration is over.",
            "Raise entropy_weight, lower the learning rate.",
        ),
        Tag(
            "train/explained_variance",
            "1",
            "Part of the variance of value targets that the values explain before a block is learnt from; at least -1.",
            "Stays near 0 or below: values are no help.",
            "Raise the learning rate, widths or epochs; check that observations tell of the rewards to come.",
        ),
        Tag(
            "train/grad_norm",
            "norm",
            "Global norm of the gradient before clipping, mean since the last value.",
            "Grows by orders of magnitude.",
            "Clip gradients, lower the learning rate, scale the rewards.",
        ),
        Tag(
            "train/learning_rate",
            "1",
            "Learning rate of the optimiser.",
            "Is not what the schedule says.",
            "Compare with the run's config.json.",
        ),
        Tag(
            "train/loss",
            "loss",
            "Loss of the learner, mean since the last value.",
            "Grows without end; a small steady rise is normal while returns grow.",
            "Lower the learning rate, clip gradients, update the target network less often.",
        ),
        Tag(
            "train/policy_gradient_loss",
            "loss",
            "The policy's part of the loss, mean.",
            "Always near 0 while the return does not rise.",
            "See train/clip_fraction and the advantages: rewards may not depend on actions.",
        ),
        Tag(
            "train/q_drift",
            "1",
            "How far values are from those by which the sampled actions were chosen, as part of the greatest: weights "
            "have changed since, and the stored carry is of the weights of then. Mean since the last value.",
            "Near 1, or grows while train/loss does not.",
            "Use a longer burn-in, a smaller capacity or a lower learning rate.",
        ),
        Tag(
            "train/q_mean",
            "reward",
            "Mean value of the actions in the batches, since the last value.",
            "Far above any return there can be: the values chase themselves.",
            "Use double estimates, update the target network less often, lower the learning rate.",
        ),
        Tag(
            "train/std",
            "1",
            "Standard deviation of continuous actions, mean over their parts; in -1 .. 1 where these are bounded.",
            "Grows without end, or falls to 0 before the return has risen.",
            "Lower entropy_weight where it grows, raise it where it falls.",
        ),
        Tag(
            "train/value_loss",
            "loss",
            "The value's part of the loss, mean; of PPO in variances of the targets.",
            "Grows while the return does not.",
            "Lower the learning rate; check for rewards that are rare and large.",
        ),
    )
}

_registered: dict[str, Tag] = {}


def register(name: str, unit: str, meaning: str) -> Tag:
    """Declare a tag of your own, once, before it is logged.

    Args:
        name: ``group/quantity``: a group of lower-case letters, digits and ``_``, then at least one more part.
        unit: What the values count or measure.
        meaning: One sentence.

    Returns:
        The tag. Declaring the same again gives the same.

    Raises:
        ConfigError: If the name is malformed, or declared already with another unit or meaning.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"tag {name!r}: is malformed; expected group/quantity, such as 'my_agent/entropy'.")
    tag = Tag(name, unit, meaning)
    known = TAGS.get(name) or _registered.setdefault(name, tag)
    if (known.unit, known.meaning) != (unit, meaning):
        raise ConfigError(
            f"tag {name!r}: means {meaning!r} in {unit!r} here and {known.meaning!r} in {known.unit!r} where it was "
            "declared before; expected one meaning. Choose another name."
        )
    return known


def lookup(name: str) -> Tag:
    """Find a declared tag.

    Args:
        name: The tag's name.

    Returns:
        The tag.

    Raises:
        TagError: If nobody declared it; the message suggests the nearest.
    """
    tag = TAGS.get(name) or _registered.get(name)
    if tag is None:
        raise TagError(
            f"tag {name!r}: is not declared; expected one of docs/metrics.md.{suggest(name, [*TAGS, *_registered])} "
            "Declare your own with rlfeed.log.tags.register(name, unit, meaning)."
        )
    return tag


def markdown() -> str:
    """Write the page ``docs/metrics.md``.

    Returns:
        The page, made of the table alone.
    """
    rows = [f"| `{tag.name}` | {tag.unit} | {tag.meaning} | {tag.bad} | {tag.remedy} |" for tag in TAGS.values()]
    return "\n".join(
        (
            "# Metrics",
            "",
            "The curves that rlfeed writes for TensorBoard (`make tensorboard`). Their x-axis is env steps, summed",
            "over environments. Declare your own with `rlfeed.log.tags.register(name, unit, meaning)`.",
            "",
            "This page is generated from `rlfeed/log/tags.py`; change it there.",
            "",
            "| Tag | Unit | Meaning | What is bad | What to do |",
            "|---|---|---|---|---|",
            *rows,
            "",
        )
    )
