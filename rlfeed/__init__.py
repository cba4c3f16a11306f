"""rlfeed: reinforcement-learning rollouts and replay on PyTorch and Gymnasium."""
