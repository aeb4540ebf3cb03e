"""The engine: prompts, rollouts and PPO. Knows nothing about pfrl, gym, files or terminals."""
