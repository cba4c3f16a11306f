"""The table of scores as data: which preset plays which task for how long, and what it is to reach."""

from dataclasses import dataclass

MASKED_CARTPOLE = "rlfeed.testing.masked:MaskedVelocityCartPole"
MINATAR = "minatar.gym:BaseEnv"  # MinAtar/{Game}-v1 is this class with the game's minimal actions
GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
POINTS = 10  # of every curve
PEER = "sb3-"  # begins the presets of stable-baselines3


@dataclass(frozen=True, kw_only=True)
class Row:
    """Say what is trained, for how long, and what it is to reach.

    Args:
        name: Of the row and of the file that keeps its results.
        task: What the table calls the environment.
        preset: Of rlfeed; with ``sb3-`` before it, an algorithm of stable-baselines3.
        env_id: The environment, as ``--env.id`` takes it.
        total_steps: Env steps of a run.
        goal: What the interquartile mean of the seeds is to reach; None where nothing is promised.
        at_most: Whether it is to stay below instead: a control that must not learn the task.
        floor: What a run counts that crashed: no policy gets less.
        seeds: How many runs, of the seeds 0, 1, ...
        episodes: Of each of the evaluations, of the curve and of the last policy.
        flags: Settings that differ from the preset's defaults, as ``scripts/train.py`` takes them.
        explore: Whether the last policy is also scored as it explores: a stochastic policy's other reading.
        needs: Modules that have to be installed; ``cuda`` is a GPU.
    """

    name: str
    task: str
    preset: str
    env_id: str
    total_steps: int
    goal: float | None = None
    at_most: bool = False
    floor: float = 0.0
    seeds: int = 5
    episodes: int = 20
    flags: tuple[str, ...] = ()
    explore: bool = False
    needs: tuple[str, ...] = ()

    @property
    def is_peer(self) -> bool:
        """Tell whether stable-baselines3 runs it.

        Returns:
            True for a peer.
        """
        return self.preset.startswith(PEER)

    def arguments(self, seed: int) -> list[str]:
        """Give what ``scripts/train.py PRESET`` is called with to make the same run.

        Args:
            seed: The run's.

        Returns:
            Flags.
        """
        steps = ["--total-steps", f"{self.total_steps}", "--eval-every", f"{max(1, self.total_steps // POINTS)}"]
        return [
            "--env.id",
            self.env_id,
            *self.flags,
            *steps,
            "--eval-episodes",
            f"{self.episodes}",
            "--seed",
            f"{seed}",
        ]

    def is_reached(self, score: float) -> bool:
        """Tell whether a score is what the row promises.

        Args:
            score: The interquartile mean.

        Returns:
            True where it is, and where nothing is promised.
        """
        if self.goal is None:
            return True
        return score <= self.goal if self.at_most else score >= self.goal


def _minatar(preset: str, game: str, total_steps: int) -> Row:
    game_flags = ("--env.kwargs.game", game, "--env.kwargs.use_minimal_action_set", "true")
    return Row(
        name=f"minatar-{game.replace('_', '-')}-{preset}",
        task=f"MinAtar {game.replace('_', ' ')}",
        preset=preset,
        env_id=MINATAR,
        total_steps=total_steps,
        seeds=3,
        flags=game_flags,
        needs=("minatar", *(("stable_baselines3",) if preset.startswith(PEER) else ())),
    )


ROWS = (
    Row(name="cartpole-dqn", task="CartPole-v1", preset="dqn", env_id="CartPole-v1", total_steps=50_000, goal=490),
    Row(
        name="cartpole-ppo",
        task="CartPole-v1",
        preset="ppo",
        env_id="CartPole-v1",
        total_steps=100_000,
        goal=495,
        explore=True,
    ),
    Row(name="cartpole-pqn", task="CartPole-v1", preset="pqn", env_id="CartPole-v1", total_steps=300_000, goal=495),
    Row(
        name="masked-cartpole-ppo-rnn",
        task="CartPole-v1 without velocities",
        preset="ppo_rnn",
        env_id=MASKED_CARTPOLE,
        total_steps=100_000,
        goal=490,
        explore=True,
    ),
    Row(
        name="masked-cartpole-r2d2",
        task="CartPole-v1 without velocities",
        preset="r2d2",
        env_id=MASKED_CARTPOLE,
        total_steps=150_000,
        goal=475,
    ),
    Row(
        name="masked-cartpole-ppo",
        task="CartPole-v1 without velocities, without memory",
        preset="ppo",
        env_id=MASKED_CARTPOLE,
        total_steps=100_000,
        goal=200,
        at_most=True,
    ),
    Row(
        name="masked-cartpole-dqn",
        task="CartPole-v1 without velocities, without memory",
        preset="dqn",
        env_id=MASKED_CARTPOLE,
        total_steps=150_000,
        goal=200,
        at_most=True,
    ),
    Row(
        name="pendulum-sac",
        task="Pendulum-v1",
        preset="sac",
        env_id="Pendulum-v1",
        total_steps=20_000,
        goal=-160,
        floor=-3300,
        episodes=50,  # they differ by 90
    ),
    Row(
        name="acrobot-dqn",
        task="Acrobot-v1",
        preset="dqn",
        env_id="Acrobot-v1",
        total_steps=100_000,
        goal=-80,
        floor=-500,
    ),
    Row(
        name="mountain-car-sac",
        task="MountainCarContinuous-v0",
        preset="sac",
        env_id="MountainCarContinuous-v0",
        total_steps=50_000,
        goal=93,
        floor=-100,
    ),
    Row(
        name="lunar-lander-rainbow",
        task="LunarLander-v3",
        preset="rainbow",
        env_id="LunarLander-v3",
        total_steps=300_000,
        goal=250,
        floor=-1000,
        needs=("Box2D",),
    ),
    Row(
        name="lunar-lander-ppo",
        task="LunarLander-v3",
        preset="ppo",
        env_id="LunarLander-v3",
        total_steps=1_000_000,
        goal=240,
        floor=-1000,
        explore=True,
        needs=("Box2D",),
    ),
    Row(
        name="half-cheetah-sac",
        task="HalfCheetah-v4",
        preset="sac",
        env_id="HalfCheetah-v4",
        total_steps=50_000,
        goal=3806,  # the low end of the published interval, 4242 [3806, 4612]
        floor=-1000,
        needs=("mujoco",),
    ),
    *(_minatar("pqn", game, 1_000_000) for game in GAMES),
    *(_minatar("rainbow", game, 500_000) for game in ("breakout", "space_invaders")),
    *(_minatar("sb3-dqn", game, 500_000) for game in ("breakout", "space_invaders")),
    *(_minatar("sb3-ppo", game, 1_000_000) for game in ("breakout", "space_invaders")),
    Row(
        name="hopper-xqc",
        task="Hopper-v4",
        preset="xqc",
        env_id="Hopper-v4",
        total_steps=50_000,
        goal=2450,
        flags=("--device", "cuda"),
        needs=("mujoco", "cuda"),
    ),
)
