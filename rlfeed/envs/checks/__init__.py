"""The single checks that `rlfeed.envs.check.check_env` is made of."""
